"""Where the model meets ranks: launching, expert parallelism, the DeepSpeed engine. The only room that imports deepspeed."""

import os
import warnings

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # before deepspeed is imported, which else warns that it found no GPU

# DeepSpeed's ZeRO still calls these by their old names, on every rank and step.
for name in ("all_gather_into_tensor", "reduce_scatter_tensor"):
    warnings.filterwarnings("ignore", message=f".*torch.distributed.{name}.* is deprecated", category=FutureWarning)
