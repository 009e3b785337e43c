"""Collectives counted by hand: calls and bytes of each kind, of a dispatch and of DeepSpeed's step; nothing stays replaced."""

import pytest
import torch
import torch.distributed as dist
from deepspeed.comm import comm

from modsquad_ds.parallel import launch
from modsquad_ds.parallel.ranks import Ranks
from modsquad_ds.parallel.traffic import Call, Total, Traffic, counted
from modsquad_ds.trainer import build_trainer, forward_backward
from ranks import run_ranks
from small import small_batch, small_recipe


def every_kind(rank: int, world: int) -> list[tuple[str, bool, int, int, int]]:
    launch.start()
    x = torch.ones(12, 2)
    pair = dist.new_group([0, 1])
    before = (dist.all_reduce, comm.cdb.all_reduce)
    with counted() as traffic:
        dist.all_to_all_single(torch.empty(12, 2), x)
        sent = [1, 2, 3] if rank == 0 else [0, 0, 0]
        received = [[1, 0, 0], [2, 0, 0], [3, 0, 0]][rank]
        dist.all_to_all_single(torch.empty(sum(received), 2), x[: sum(sent)].contiguous(), received, sent)
        dist.all_to_all_single(torch.empty(3, 4, dtype=torch.int64), torch.ones(3, 4, dtype=torch.int64))
        if rank < 2:
            dist.all_reduce(x.bfloat16(), group=pair)
        dist.reduce(x, 1)
        dist.broadcast(x, src=0)
        dist.all_gather([torch.empty(12, 2) for _ in range(world)], x)
        comm.all_reduce(x)
        comm.all_gather_into_tensor(torch.empty(36, 2), x)
        comm.reduce_scatter_tensor(torch.empty(4, 2), x)
        dist.all_reduce(x, async_op=True).wait()
        dist.barrier()
    assert (dist.all_reduce, comm.cdb.all_reduce) == before and "all_reduce" not in vars(comm.cdb)
    dist.all_reduce(x)
    assert all(call.seconds > 0 for call in traffic.calls)
    assert sum(t.calls for t in traffic.totals().values()) == len(traffic.calls)
    return [call._replace(seconds=0.0)[:5] for call in traffic.calls]


@pytest.mark.dist
def test_calls_and_bytes_are_those_counted_by_hand() -> None:
    zero, one, two = run_ranks(3, every_kind)
    assert zero == [
        ("rows", False, 3, 24, 64),  # 96 bytes, a third stays
        ("rows", False, 3, 12, 40),  # rows of 8 bytes, the one to itself stays
        ("counts", False, 3, 12, 64),
        ("all_reduce", False, 2, 24, 48),
        ("reduce", False, 3, 24, 96),
        ("broadcast", False, 3, 24, 192),
        ("all_gather", False, 3, 24, 192),
        ("all_reduce", True, 3, 24, 128),
        ("all_gather", True, 3, 24, 192),
        ("reduce_scatter", True, 3, 24, 64),
        ("all_reduce", False, 3, 24, 128),
        ("barrier", False, 3, 0, 0),
    ]
    differs = {1: ("rows", False, 3, 0, 0), 4: ("reduce", False, 3, 24, 0), 5: ("broadcast", False, 3, 24, 0)}
    assert one == [differs.get(i, call) for i, call in enumerate(zero)]
    assert two == [differs.get(i, call) if i != 4 else call for i, call in enumerate(zero) if i != 3]


def training_step(rank: int, world: int) -> tuple[list[Call], int, int]:
    ranks = launch.start()
    trainer = build_trainer(small_recipe(**{"parallel.ep_size": world}), Ranks(ranks.rank, ranks.world))
    batch = small_batch(0, rank, world)
    seen = []
    for layer in trainer.network.backbone.sparse_layers().values():
        layer.router.register_forward_hook(lambda _, __, routing: seen.append(routing.stats.count_TE.sum(0)))
    with counted() as traffic:
        forward_backward(trainer, batch)
        trainer.engine.step()
    assert traffic.by_deepspeed().seconds > 0
    weights = sum(p.numel() for p in trainer.network.parameters() if getattr(p, "allreduce", True))
    leaving = [int(count_E.view(world, -1)[1 - rank].sum()) for count_E in seen[1::2]]  # MoE MLP follows attention in a block
    return traffic.calls, weights, sum(leaving)


@pytest.mark.dist
def test_a_training_step_sends_the_rows_of_other_ranks_experts_and_reduces_all_weights() -> None:
    results = run_ranks(2, training_step)
    # Each rank's leaving rows go out, their results come back, and so do their gradients: 32 floats of 4 bytes, four times.
    # Two of the four are sent by this rank, two by the other.
    crossing = 2 * 32 * 4 * sum(leaving for _, _, leaving in results)
    assert crossing > 0
    for calls, weights, _ in results:
        rows = [call for call in calls if call.kind == "rows"]
        assert len(rows) == 2 * 4 and {call.ranks for call in rows} == {2}
        assert sum(call.bytes for call in rows) == crossing
        assert len([call for call in calls if call.kind == "counts"]) == 2
        reduced = sum(call.elements for call in calls if call.deepspeed and call.kind in ("all_reduce", "reduce"))
        assert reduced >= weights
        assert len([call for call in calls if call.kind == "all_reduce" and not call.deepspeed]) == 1


def test_totals_sum_the_calls_of_a_kind() -> None:
    traffic = Traffic()
    traffic.calls = [
        Call("rows", False, 2, 4, 8, 0.5), Call("counts", False, 2, 1, 2, 0.25), Call("rows", False, 2, 1, 1, 1.0),
        Call("reduce", True, 2, 3, 3, 2.0),
    ]  # fmt: skip
    assert traffic.totals() == {"rows": Total(2, 9, 1.5), "counts": Total(1, 2, 0.25), "reduce": Total(1, 3, 2.0)}
    assert traffic.all_to_all() == Total(3, 11, 1.75) and traffic.by_deepspeed() == Total(1, 3, 2.0)
