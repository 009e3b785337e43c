"""Who this process is, under `deepspeed`, `torchrun`, `srun` or alone. Light to import: cli.py asks it when all else failed."""

from collections.abc import Mapping
from dataclasses import dataclass

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


def check_world(ranks: Ranks, expected: int | None) -> None:
    """Refuse to train on another number of ranks than `parallel.expect_world_size`. UserError with both and the usual causes."""
    if expected not in (None, ranks.world):
        raise UserError(
            f"{ranks.world} rank(s) started, parallel.expect_world_size is {expected}: `deepspeed` without --hostfile "
            "starts ranks on one node (add --hostfile FILE --no_ssh_check), `python` in a batch script is one rank "
            "(put srun before it), srun without --ntasks-per-node starts one rank per node"
        )
