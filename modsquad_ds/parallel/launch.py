"""The process group and this rank's device, under whatever launcher started it. Called first of all."""

import os
import socket
from datetime import timedelta

import deepspeed
import torch
import torch.distributed as dist

from modsquad_ds.errors import UserError
from modsquad_ds.parallel.ranks import RANK_VARIABLES, Ranks, ranks_from


def device_index(local_rank: int, visible: int, bound: bool) -> int:
    """GPU of a rank among the `visible` ones. `bound`: the scheduler may show each process just its own, as number 0."""
    if bound and visible == 1:
        return 0
    if local_rank >= visible:
        raise UserError(f"local rank {local_rank} but {visible} visible GPUs on {socket.gethostname()}: start one rank per GPU")
    return local_rank


def start(timeout_minutes: float = 10.0) -> Ranks:
    """Join the process group (NCCL on GPUs, gloo on CPUs) and pick this rank's device. Call once, before any collective."""
    ranks = ranks_from(os.environ)
    by_srun = ranks.world > 1 and "RANK" not in os.environ
    values = (ranks.rank, ranks.world, ranks.local_rank)
    os.environ.update({name: str(value) for name, value in zip(RANK_VARIABLES, values, strict=True)})
    if ranks.world == 1:
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", str(_free_port()))
    if torch.cuda.is_available():
        torch.cuda.set_device(device_index(ranks.local_rank, torch.cuda.device_count(), by_srun))
    _init(timedelta(minutes=timeout_minutes))
    return ranks


def stop() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def device() -> torch.device:
    """This rank's device."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def _init(timeout: timedelta) -> None:
    # Only inference uses this op, and building it holds all ranks behind a file lock for minutes.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    deepspeed.init_distributed(dist_backend=backend, timeout=timeout, auto_mpi_discovery=False, verbose=False)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
