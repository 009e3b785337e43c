"""Ranks as every launcher states them, the collectives, and experts over two ranks against all experts in one process."""

import os
import re
import socket
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from modsquad_ds.errors import UserError
from modsquad_ds.model.dispatch import Dispatcher, Groups, LocalDispatcher
from modsquad_ds.model.experts import MLPExperts
from modsquad_ds.model.products import expert_linear
from modsquad_ds.model.router import Routing, RoutingStats
from modsquad_ds.parallel import launch
from modsquad_ds.parallel.collectives import barrier, broadcast_json, gather_json, sum_over_ranks, world_size
from modsquad_ds.parallel.dispatch import AllToAllDispatcher
from modsquad_ds.parallel.launch import device_index
from modsquad_ds.parallel.ranks import Ranks, check_world, ranks_from
from ranks import free_port, run_ranks

# ---------------------------------------------------------------- who am I

ADDRESS = {"MASTER_ADDR": "node1", "MASTER_PORT": "29500"}
DEEPSPEED = {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", **ADDRESS}
TORCHRUN = {
    "RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "1", "ROLE_RANK": "3",
    "TORCHELASTIC_RUN_ID": "none", **ADDRESS,
}  # fmt: skip
SRUN = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_PROCID": "6", "SLURM_NTASKS": "16", "SLURM_LOCALID": "2", **ADDRESS}
BATCH_SHELL = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "16", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        (DEEPSPEED, Ranks(5, 8, 1)),
        (TORCHRUN, Ranks(3, 4, 1)),
        (SRUN, Ranks(6, 16, 2)),
        ({}, Ranks(0, 1, 0)),
        ({"HOME": "/", **ADDRESS}, Ranks(0, 1, 0)),
        # One task needs no address.
        ({"SLURM_STEP_ID": "3", "SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_LOCALID": "0"}, Ranks(0, 1, 0)),
        # torchrun inside of an srun step: the ranks are torchrun's.
        ({**SRUN, **TORCHRUN}, Ranks(3, 4, 1)),
        # Shells of a job, which no srun started: one process, whatever the job's number of tasks.
        (BATCH_SHELL, Ranks(0, 1, 0)),
        ({**BATCH_SHELL, "SLURM_STEP_ID": ""}, Ranks(0, 1, 0)),
        ({**BATCH_SHELL, "SLURM_STEP_ID": "4294967291"}, Ranks(0, 1, 0)),
        ({**BATCH_SHELL, "SLURM_STEP_ID": "4294967290"}, Ranks(0, 1, 0)),
    ],
)
def test_ranks_of_every_launcher(environment: dict[str, str], expected: Ranks) -> None:
    assert ranks_from(environment) == expected
    assert ranks_from(environment).first == (expected.rank == 0)


def without(environment: dict[str, str], *names: str) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name not in names}


@pytest.mark.parametrize(
    ("environment", "parts"),
    [
        ({"RANK": "1"}, ["RANK set but WORLD_SIZE, LOCAL_RANK not", "deepspeed, torchrun or srun"]),
        (without(DEEPSPEED, "LOCAL_RANK"), ["RANK, WORLD_SIZE set but LOCAL_RANK not"]),
        ({"WORLD_SIZE": "2"}, ["WORLD_SIZE set but RANK, LOCAL_RANK not"]),
        ({**SRUN, "LOCAL_RANK": "0"}, ["LOCAL_RANK set but RANK, WORLD_SIZE not"]),
        (without(SRUN, "SLURM_NTASKS"), ["SLURM_PROCID, SLURM_LOCALID set but SLURM_NTASKS not"]),
        (without(DEEPSPEED, "MASTER_PORT"), ["8 ranks but MASTER_PORT not set", "a free port"]),
        (without(SRUN, "MASTER_ADDR", "MASTER_PORT"), ["16 ranks but MASTER_ADDR, MASTER_PORT not set", "first node's name"]),
        ({**DEEPSPEED, "RANK": ""}, ["RANK=''", "WORLD_SIZE='8'", "expected whole numbers"]),
        ({**DEEPSPEED, "WORLD_SIZE": "two"}, ["WORLD_SIZE='two'", "expected whole numbers"]),
    ],
)
def test_half_a_statement_is_refused(environment: dict[str, str], parts: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        ranks_from(environment)
    assert all(part in str(caught.value) for part in parts), caught.value
    assert "\n" not in str(caught.value)


def test_another_number_of_ranks_than_asked_for_is_refused() -> None:
    check_world(Ranks(1, 2, 0), None)
    check_world(Ranks(1, 2, 0), 2)
    with pytest.raises(UserError, match=r"^1 rank\(s\) started, parallel\.expect_world_size is 2: .*--hostfile.*srun"):
        check_world(Ranks(0, 1, 0), 2)


def start_alone(rank: int, world: int) -> list[Any]:
    """Start as if no launcher had been there; both processes of the test do so at the same time."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", *ADDRESS):
        del os.environ[name]
    ranks = launch.start(collective_timeout=60)
    total = sum_over_ranks([torch.tensor(3.0)])[0].item()
    stated = [os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")]
    return [ranks, world_size(), total, stated, int(os.environ["MASTER_PORT"]), str(launch.device())]


@pytest.mark.dist
def test_single_processes_start_side_by_side_on_free_ports() -> None:
    first, second = run_ranks(2, start_alone)
    for found in (first, second):
        assert found[:4] == [Ranks(0, 1, 0), 1, 3.0, ["0", "1", "0", "127.0.0.1"]]
    assert first[4] != second[4]


def meeting(rank: int, world: int) -> list[str]:
    """What rank 0 is told whose rank 1 never comes, then one whose port is taken."""
    os.environ["WORLD_SIZE"] = "2"
    told = []
    for taken in (False, True):
        with socket.socket() as other:
            if taken:
                other.bind(("", int(os.environ["MASTER_PORT"])))
                other.listen()
            with pytest.raises(UserError) as caught:
                launch.start(collective_timeout=2)
            told.append(str(caught.value))
        os.environ["MASTER_PORT"] = str(free_port())
    return told


@pytest.mark.dist
def test_ranks_that_do_not_meet_are_told_where_and_why() -> None:
    ((lonely, taken),) = run_ranks(1, meeting)
    where = r"2 ranks did not meet at 127.0.0.1:\d+ \(rank 0 on \S+: "
    assert re.match(where + "Timed out after .*1/2 clients joined", lonely), lonely
    assert re.match(where + ".*EADDRINUSE", taken), taken
    assert all(text.endswith("or an address that not every node knows") and "\n" not in text for text in (lonely, taken))


# ---------------------------------------------------------------- collectives

TEXTS = ["", "é" * 1000]


class Reduced(NamedTuple):
    """What a rank got from the collectives."""

    ranks: Ranks
    sums: list[Tensor]
    gathered: list[Any]
    told: Any


def collectives(rank: int) -> Reduced:
    mine = [
        torch.tensor(1.5 + rank, requires_grad=True),
        torch.arange(6.0).view(2, 3) * (rank + 1),
        torch.full((4,), rank, dtype=torch.int64),
        torch.ones(2, dtype=torch.bfloat16),
        torch.zeros(0),
    ]
    sums = sum_over_ranks(mine)
    gathered = gather_json({"rank": rank, "text": TEXTS[rank], "boxes": [[0.1, 2.0]] * rank * 50})
    told = broadcast_json({"from": rank})
    barrier()
    return Reduced(Ranks(rank, world_size()), sums, gathered, told)


# ---------------------------------------------------------------- experts over ranks

EXPERTS, WIDTH, HIDDEN = 4, 6, 5
# Chosen experts of each token, by rank. Rank 0 holds experts 0 and 1, rank 1 holds 2 and 3.
SCENARIOS: dict[str, list[list[list[int]]]] = {
    "even": [[[0, 2], [3, 1]], [[1, 0], [2, 3]]],
    "ranks of unequal size": [[[0, 2], [3, 1], [2, 0], [1, 3], [0, 1]], [[2, 1]]],
    "one token here, forty there": [[[1, 3]], [[0, 2], [2, 3], [3, 1], [2, 1]] * 10],
    "both send all rows away": [[[2, 3], [3, 2], [2, 3]], [[0, 1], [1, 0]]],
    "all rows on one rank": [[[2, 3], [3, 2]], [[3, 2], [2, 3], [2, 3]]],
    "all rows on one expert": [[[3], [3], [3]], [[3]]],
    "nobody leaves": [[[0], [0], [1]], [[2], [2]]],
    "all experts of every token": [[[3, 2, 1, 0]], [[0, 1, 2, 3], [1, 3, 0, 2]]],
}


def routing_of(chosen: list[list[int]]) -> Routing:
    expert_SK = torch.tensor(chosen)
    count_TE = torch.bincount(expert_SK.flatten(), minlength=EXPERTS).float().unsqueeze(0)
    stats = RoutingStats(count_TE, count_TE, torch.tensor([float(len(chosen))]), torch.zeros(1), torch.zeros(1))
    return Routing(expert_SK, torch.ones(expert_SK.shape), stats)


def tokens_of(rank: int, count: int) -> Tensor:
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(rank))


def bank_of() -> MLPExperts:
    bank = MLPExperts(EXPERTS, WIDTH, HIDDEN)
    g = torch.Generator().manual_seed(9)
    for parameter in bank.parameters():
        parameter.data.normal_(generator=g)
    return bank


class Result(NamedTuple):
    """What one way through the experts gives."""

    output: Tensor
    summed: Tensor
    rows: tuple[int, ...]
    grads: list[Tensor]
    """Of the tokens, of the gate weights, then of the experts' parameters by name."""


def through(dispatcher: Dispatcher, bank: MLPExperts, x: Tensor, routing: Routing) -> Result:
    """Out and back three times: tokens, then rows that differ per slot, then these weighted and summed per token."""
    x = x.clone().requires_grad_()
    plan = dispatcher.plan(routing)

    def first(rows: Tensor, groups: Groups, weight_SK: Tensor | None = None) -> Tensor:
        return expert_linear(rows, groups, bank.fc1_weight, bank.fc1_bias, weight_SK)

    def second(rows: Tensor, groups: Groups, weight_SK: Tensor | None = None) -> Tensor:
        return expert_linear(rows, groups, bank.fc2_weight, bank.fc2_bias, weight_SK)

    slot = torch.arange(1.0, routing.expert_SK.shape[1] + 1).repeat(len(x)).unsqueeze(1)
    rows = torch.tanh(dispatcher.run(first, x, plan)) * slot
    output = dispatcher.run(second, rows, plan)
    gate_SK = torch.cos(slot).view(routing.expert_SK.shape).requires_grad_()
    summed = dispatcher.run(second, rows, plan, gate_SK)
    # Every row weighs differently, and the same wherever its expert is.
    loss = (output * torch.cos(output.detach()) * slot).sum() + (summed * torch.sin(summed.detach())).sum()
    parameters = [parameter for _, parameter in sorted(bank.named_parameters())]
    gradients = torch.autograd.grad(loss, (x, gate_SK, *parameters))
    return Result(output.detach(), summed.detach(), plan.groups.rows, list(gradients))


def spread(rank: int, scenario: str) -> Result:
    bank = bank_of()
    bank.keep(first=rank * EXPERTS // 2, local=EXPERTS // 2)
    chosen = SCENARIOS[scenario][rank]
    return through(AllToAllDispatcher(EXPERTS, 2), bank, tokens_of(rank, len(chosen)), routing_of(chosen))


def two_ranks(rank: int, world: int) -> tuple[Reduced, dict[str, Result]]:
    ranks = launch.start(collective_timeout=60)
    assert ranks == Ranks(rank, world, rank)
    return collectives(rank), {scenario: spread(rank, scenario) for scenario in SCENARIOS}


@pytest.fixture(scope="module")
def pair() -> list[tuple[Reduced, dict[str, Result]]]:
    """All that needs two ranks, in one job."""
    return run_ranks(2, two_ranks)


@pytest.mark.dist
def test_sums_over_ranks(pair: list[tuple[Reduced, dict[str, Result]]]) -> None:
    for reduced, _ in pair:
        scalar, matrix, whole, half, nothing = reduced.sums
        assert scalar.item() == 4.0 and scalar.shape == ()
        assert_close(matrix, torch.arange(6.0).view(2, 3) * 3)
        assert whole.tolist() == [1, 1, 1, 1] and half.tolist() == [2, 2] and nothing.shape == (0,)
        assert all(x.dtype == torch.float32 and not x.requires_grad for x in reduced.sums)


@pytest.mark.dist
def test_json_of_unequal_size_from_all_ranks(pair: list[tuple[Reduced, dict[str, Result]]]) -> None:
    expected = [{"rank": r, "text": TEXTS[r], "boxes": [[0.1, 2.0]] * r * 50} for r in (0, 1)]
    for reduced, _ in pair:
        assert reduced.gathered == expected
        assert reduced.told == {"from": 0}
    assert [reduced.ranks for reduced, _ in pair] == [Ranks(0, 2), Ranks(1, 2)]


def test_collectives_of_one_process_need_no_group() -> None:
    assert world_size() == 1
    (total,) = sum_over_ranks([torch.tensor([1, 2], dtype=torch.int32)])
    assert total.tolist() == [1.0, 2.0] and total.dtype == torch.float32
    assert gather_json({"a": (1, 2)}) == [{"a": [1, 2]}], "as it would come back from another rank"
    assert broadcast_json([None]) == [None]
    barrier()


@pytest.mark.dist
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_experts_over_ranks_are_all_experts_in_one_process(scenario: str, pair: list[tuple[Reduced, dict[str, Result]]]) -> None:
    chosen = SCENARIOS[scenario]
    x = torch.cat([tokens_of(rank, len(chosen[rank])) for rank in (0, 1)])
    whole = through(LocalDispatcher(), bank_of(), x, routing_of(chosen[0] + chosen[1]))
    parts = [results[scenario] for _, results in pair]
    assert parts[0].rows + parts[1].rows == whole.rows
    assert_close(torch.cat([part.output for part in parts]), whole.output)
    assert_close(torch.cat([part.summed for part in parts]), whole.summed)
    for i in (0, 1):
        assert_close(torch.cat([part.grads[i] for part in parts]), whole.grads[i])
    for i in range(2, 6):
        # An expert's gradient is all of it, as its rows came from both ranks.
        assert_close(torch.cat([part.grads[i] for part in parts]), whole.grads[i])
    idle = [e for e, rows in enumerate(whole.rows) if rows == 0]
    assert all(not whole.grads[i][idle].any() for i in range(2, 6))


def test_scenarios_hold_the_hard_cases() -> None:
    rows = {name: routing_of(a + b).stats.count_TE[0].tolist() for name, (a, b) in SCENARIOS.items()}
    assert rows["all rows on one expert"] == [0, 0, 0, 4]
    assert rows["all rows on one rank"][:2] == [0, 0]
    assert all({e // 2 for token in chosen for e in token} == {1 - rank}
               for rank, chosen in enumerate(SCENARIOS["both send all rows away"]))  # fmt: skip


def test_ranks_cannot_meet_at_port_0() -> None:
    environment = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "node1", "MASTER_PORT": "0"}
    with pytest.raises(UserError, match="MASTER_PORT is 0"):
        ranks_from(environment)
    assert ranks_from({**environment, "MASTER_PORT": "29500"}).world == 2


def test_a_rank_finds_its_gpu_among_those_it_sees() -> None:
    assert [device_index(rank, 4, bound) for rank in range(4) for bound in (False, True)] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert device_index(3, 1, bound=True) == 0, "srun with one GPU bound to each task"
    with pytest.raises(UserError, match="local rank 2 but 2 visible GPUs on"):
        device_index(2, 2, bound=True)
    with pytest.raises(UserError, match="local rank 1 but 1 visible"):
        device_index(1, 1, bound=False)
