"""Ranks: who this process is, under `deepspeed`, `torchrun`, `srun` or alone, and the process group. Called first of all."""

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

import deepspeed
import torch
import torch.distributed as dist

from modsquad_ds.errors import UserError


@dataclass(frozen=True)
class Ranks:
    """This process among all."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0

    @property
    def first(self) -> bool:
        """Whether this rank prints, logs and writes."""
        return self.rank == 0


RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
SLURM_VARIABLES = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")
ADDRESS_VARIABLES = ("MASTER_ADDR", "MASTER_PORT")
NOT_SRUN = (None, "", "4294967291", "4294967290")
"""SLURM_STEP_ID where no srun started this process: outside of Slurm, in a batch script's shell, in the shell of salloc."""


def ranks_from(environment: Mapping[str, str]) -> Ranks:
    """Ranks as the launcher states them. Raises UserError on half a statement, which would train many separate models.

    `deepspeed` and `torchrun` set RANK and its kin; `srun` sets SLURM_PROCID and its kin; none of both is one process. A batch
    script's own shell also has SLURM_NTASKS but no srun step, so SLURM_STEP_ID decides.
    """
    for names in (RANK_VARIABLES, SLURM_VARIABLES):
        given = [name for name in names if name in environment]
        if names is SLURM_VARIABLES and environment.get("SLURM_STEP_ID") in NOT_SRUN:
            continue
        if len(given) == len(names):
            if not all(environment[name].isdigit() for name in names):
                stated = " ".join(f"{name}={environment[name]!r}" for name in names)
                raise UserError(f"{stated}: expected whole numbers; unset them, or start through deepspeed, torchrun or srun")
            rank, world, local = (int(environment[name]) for name in names)
            missing = [name for name in ADDRESS_VARIABLES if name not in environment]
            if world > 1 and missing:
                raise UserError(f"{world} ranks but {', '.join(missing)} not set: export the first node's name and a free port")
            if world > 1 and environment["MASTER_PORT"] == "0":
                raise UserError("MASTER_PORT is 0, which ranks cannot meet at: torchrun wants --standalone, or give a free port")
            return Ranks(rank, world, local)
        if given:
            absent = ", ".join(name for name in names if name not in environment)
            raise UserError(f"{', '.join(given)} set but {absent} not: start through deepspeed, torchrun or srun, or set all")
    return Ranks()


def device_index(local_rank: int, visible: int) -> int:
    """GPU of a rank among the `visible` ones. A scheduler that binds GPUs to tasks shows each process just its own, number 0."""
    if visible == 1:
        return 0
    if local_rank >= visible:
        raise UserError(f"local rank {local_rank} but {visible} visible GPUs on {socket.gethostname()}: start one rank per GPU")
    return local_rank


def start(timeout_minutes: float = 10.0) -> Ranks:
    """Join the process group (NCCL on GPUs, gloo on CPUs) and pick this rank's device. Call once, before any collective."""
    ranks = ranks_from(os.environ)
    values = (ranks.rank, ranks.world, ranks.local_rank)
    os.environ.update({name: str(value) for name, value in zip(RANK_VARIABLES, values, strict=True)})
    if ranks.world == 1:
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", str(_free_port()))
    if torch.cuda.is_available():
        torch.cuda.set_device(device_index(ranks.local_rank, torch.cuda.device_count()))
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
