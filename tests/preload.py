"""What every rank of a test would import for itself, seconds of it: imported once, by the server that ranks are forked from.

Imports only: a rank must not find anything set up, such as a process group, that a program of its own would not have.
"""

import os

# DeepSpeed imports torch's compiler, which would start processes and threads of its own; a fork copies no threads.
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"

import deepspeed.runtime.zero.muon.original_muon  # noqa: F401
import timm.models  # noqa: F401
import torch

import modsquad_ds.train  # noqa: F401
from modsquad_ds import mmseg_compat

with torch.random.fork_rng():
    mmseg_compat.fcn_head(in_channels=4, channels=4, num_classes=2, num_convs=1)
