"""The process group and this rank's device, under whatever launcher started it. Called first of all."""

import os
import socket
from datetime import timedelta

import deepspeed
import torch
import torch.distributed as dist

from modsquad_ds.errors import UserError
from modsquad_ds.parallel import watchdog
from modsquad_ds.parallel.ranks import RANK_VARIABLES, Ranks, ranks_from


def device_index(local_rank: int, visible: int, bound: bool) -> int:
    """GPU of a rank among the `visible` ones. `bound`: the scheduler may show each process just its own, as number 0."""
    if bound and visible == 1:
        return 0
    if local_rank >= visible:
        raise UserError(f"local rank {local_rank} but {visible} visible GPUs on {socket.gethostname()}: start one rank per GPU")
    return local_rank


def start(collective_timeout: float = 600.0) -> Ranks:
    """Join the process group (NCCL on GPUs, gloo on CPUs) and pick this rank's device. Call once, before any collective.

    The watchdog starts with it: within `collective_timeout` seconds a rank that is gone or stands still ends the job.
    """
    ranks = ranks_from(os.environ)
    by_srun = ranks.world > 1 and "RANK" not in os.environ
    values = (ranks.rank, ranks.world, ranks.local_rank)
    os.environ.update({name: str(value) for name, value in zip(RANK_VARIABLES, values, strict=True)})
    if ranks.world == 1:
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", str(_free_port()))
    if torch.cuda.is_available():
        torch.cuda.set_device(device_index(ranks.local_rank, torch.cuda.device_count(), by_srun))
    _init(ranks, collective_timeout)
    watchdog.start(ranks, collective_timeout)
    return ranks


def stop() -> None:
    """Leave the process group, all ranks together: rank 0 keeps the store that the others still talk to."""
    if dist.is_initialized():
        if dist.get_world_size() > 1:
            dist.barrier()
        watchdog.stop()
        dist.destroy_process_group()


def group_timeout(collective_timeout: float) -> timedelta:
    """How long a process group waits. Much longer than the watchdog, which is to end the job before: it knows who is to blame,
    and it does not mind a wait for a rank that works on."""
    return timedelta(seconds=2 * collective_timeout + 30)


def limit_group(group: dist.ProcessGroup | None, timeout: timedelta) -> None:
    """Set how long collectives of a group may take; None: the group of all ranks."""
    # torch before its public name for this has only the private one.
    set_timeout = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout
    set_timeout(timeout, group)


def device() -> torch.device:
    """This rank's device."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def _init(ranks: Ranks, collective_timeout: float) -> None:
    # Only inference uses this op, and building it holds all ranks behind a file lock for minutes.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if ranks.world > 1:
        # Else torch aborts a process whose NCCL connection breaks, with a C++ trace that does not say whose fault it was. So the
        # collective never ends, and the watchdog names the rank that is gone.
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
    timeout = timedelta(seconds=collective_timeout)
    try:
        deepspeed.init_distributed(dist_backend=backend, timeout=timeout, auto_mpi_discovery=False, verbose=False)
    except dist.DistError as error:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        reason = str(error).split("\n")[0]
        raise UserError(
            f"{ranks.world} ranks did not meet at {address} (rank {ranks.rank} on {socket.gethostname()}: {reason}); "
            "look for a rank that did not start, a port that is taken, or an address that not every node knows"
        ) from None
    limit_group(None, group_timeout(collective_timeout))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
