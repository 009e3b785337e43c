"""Times of collectives and steps: against published runs where there are any, else worked out by hand."""

import pytest

from modsquad_ds.hardware import GPUS, SMALL_OUTSIDE, Gpu, slowdown
from modsquad_ds.projection import (
    BEST,
    LIKELY,
    WORST,
    Cluster,
    Exchange,
    Span,
    Work,
    all_gather_seconds,
    all_reduce_seconds,
    all_to_all_seconds,
    bus_rate,
    bytes_exchanged,
    bytes_summed,
    expert_group,
    same_experts_group,
    step_band,
    step_times,
)

B200 = Gpu("b200", 2.25e15, 80e12, 8e12, 740e9, 47e9, 180)
MIB = 2**20


def bus_bandwidth(size: float, span: Span, small: float = 0.0) -> float:
    """GB/s as nccl-tests counts an all-reduce."""
    return 2 * (span.ranks - 1) / span.ranks * size / all_reduce_seconds(size, span, B200, small) / 1e9


@pytest.mark.parametrize(("size", "formula", "measured"), [(16, 307, 255), (128, 629, 568), (1024, 724, 723), (4096, 736, 741)])
def test_all_reduce_in_a_node_meets_published_runs(size: int, formula: int, measured: int) -> None:
    assert round(bus_bandwidth(size * MIB, Span(1, 8))) == formula
    assert bus_bandwidth(size * MIB, Span(1, 8), small=1.0) == pytest.approx(measured, rel=0.02)


@pytest.mark.parametrize(("size", "formula", "measured"), [(16, 157, 64), (128, 320, 198), (1024, 368, 362), (4096, 374, 377)])
def test_all_reduce_between_nodes_meets_published_runs_once_corrected(size: int, formula: int, measured: int) -> None:
    assert round(bus_bandwidth(size * MIB, Span(4, 8))) == formula
    assert bus_bandwidth(size * MIB, Span(4, 8), small=1.0) == pytest.approx(measured, rel=0.03)


def test_h200_at_16_gib() -> None:
    """369 GB/s measured on 4 nodes of 8 (network of 8 x 50 GB/s)."""
    span = Span(4, 8)
    seconds = all_reduce_seconds(16 * 2**30, span, GPUS["h200"])
    assert 2 * 31 / 32 * 16 * 2**30 / seconds / 1e9 == pytest.approx(369, rel=0.01)


def test_correction_lies_between_its_rows() -> None:
    assert slowdown(SMALL_OUTSIDE, 1) == 2.5 and slowdown(SMALL_OUTSIDE, 2**40) == 1.02
    assert slowdown(SMALL_OUTSIDE, 2**27) == 1.62
    assert slowdown(SMALL_OUTSIDE, 2**25.5) == pytest.approx((2.45 + 1.62) / 2), "half way by the logarithm"


def test_rates_and_other_collectives_by_hand() -> None:
    gpu = Gpu("x", 100e12, 10e12, 1e12, 100e9, 20e9, 80)
    assert [bus_rate(span, gpu) for span in (Span(1, 8), Span(2, 8), Span(2, 4), Span(4, 1))] == [100e9, 100e9, 80e9, 20e9]
    assert all_reduce_seconds(1e9, Span(1, 1), gpu) == all_gather_seconds(1e9, Span(1, 1), gpu) == 0
    # Two ranks in a node: one step of 3.4 us, half of 1 GB at 100 GB/s.
    assert all_gather_seconds(1e9, Span(1, 2), gpu) == pytest.approx(8.4e-6 + 3.4e-6 + 0.005)
    # Two nodes of two: ring of 3 steps, one of them between nodes; 3/4 of 1 GB at 2 x 20 GB/s.
    assert all_gather_seconds(1e9, Span(2, 2), gpu) == pytest.approx(8.4e-6 + 2 * 3.4e-6 + 14e-6 + 0.75 / 40)
    # Of 800 MB, 7/8 leave at 100 GB/s; over two nodes of 4, 4/8 leave by the card of 20 GB/s, which takes longer than 3/8 inside.
    assert all_to_all_seconds(0.8e9, Span(1, 8), gpu) == pytest.approx(20e-6 + 7e-6 + 0.7 / 100)
    assert all_to_all_seconds(0.8e9, Span(2, 4), gpu) == pytest.approx(20e-6 + 21e-6 + 0.4 / 20)


def test_groups_of_ranks() -> None:
    cluster = Cluster(GPUS["a100"], 4, 8)
    assert [expert_group(ep, cluster) for ep in (1, 2, 8, 16, 32)] == [(1, 1), (1, 2), (1, 8), (2, 8), (4, 8)]
    assert [same_experts_group(ep, cluster) for ep in (1, 2, 8, 16, 32)] == [(4, 8), (4, 4), (4, 1), (2, 1), (1, 1)]
    assert expert_group(4, Cluster(GPUS["a100"], 2, 6)).nodes == 2, "ranks 4 to 7 lie on two nodes of 6"


def work(**changes: object) -> Work:
    """1 TFLOP, 100 M shared and 800 M expert parameters of one layer over 8 ranks, which exchange 80 MB four times."""
    given = Work(
        flops=1e12, operations=0, expert_share=0.5, width=768, bf16=True, row_bytes=0, dense=100e6, experts=((8, 800e6),),
        exchanges=(Exchange(8, 80e6, 4, 1),), reductions=1, message=4, weight=2, bucket=50_000_000, overlap=False, zero=1,
    )  # fmt: skip
    return given._replace(**changes)  # type: ignore[arg-type]


def test_bytes_of_a_step_by_hand() -> None:
    cluster = Cluster(GPUS["a100"], 2, 8)
    assert bytes_exchanged(work()) == 4 * 80e6 * 7 / 8
    # fp32 gradients there and back, bf16 weights once: shared ones among 16, a rank's 100 M experts among 2.
    assert bytes_summed(work(), cluster) == pytest.approx(100e6 * (15 / 16 + 1 / 2) * (2 * 4 + 2))
    assert bytes_summed(work(reductions=3, zero=2), cluster) == pytest.approx(100e6 * (15 / 16 + 1 / 2) * (6 * 4 + 2))


def test_times_of_a_step_by_hand() -> None:
    gpu = GPUS["a100"]
    one = Cluster(gpu, 1, 8)
    times = step_times(work(), one, BEST)
    assert times.compute == pytest.approx(1e12 / (312e12 * 0.38 * 0.9))
    assert times.exchange == pytest.approx(4 * (27e-6 + 70e6 / 235e9) + 45e-6)
    # Experts have no copies in a job of 8: the shared 100 M alone are summed, in two buckets of 200 MB.
    latency = 8.4e-6 + 14 * 3.4e-6
    assert times.gradients == pytest.approx(2 * (latency + 2 * 7 / 8 * 200e6 / 235e9))
    assert times.gather == pytest.approx(8.4e-6 + 7 * 3.4e-6 + 7 / 8 * 200e6 / 235e9)
    assert times.update == pytest.approx((28 * (100e6 / 8 + 100e6) + 6 * 200e6) / 2e12)
    assert step_times(work(overlap=True), one, BEST).gradients == 0, "two thirds of the computation hide it"
    assert step_times(work(operations=10_000), one, BEST).compute == pytest.approx(0.05), "the host's 5 us each"
    even, uneven = (step_times(work(), one, LIKELY._replace(imbalance=i)) for i in (1.0, 2.0))
    assert uneven.compute == pytest.approx(1.5 * even.compute)
    alone = work(dense=900e6, experts=(), exchanges=())
    assert step_times(alone, one, WORST).compute == pytest.approx(1e12 / (312e12 * 0.2 * 0.8)), "nothing to be uneven about"


def test_a_band_holds_its_middle_and_widens_with_doubts() -> None:
    band = step_band(work(), Cluster(GPUS["h100"], 4, 8))
    assert band.low < band.likely < band.high and band.high > 2 * band.low


def test_large_expert_hidden_widths_favour_spreading_and_small_ones_do_not() -> None:
    """On one node, rows of 768: experts of 768 hidden, 4 of 16 chosen, against those of 24 times the width, 1 of 16 chosen."""
    cluster = Cluster(GPUS["a100"], 1, 8)
    tokens = 128 * 196

    def step(ep: int, hidden: int, top_k: int) -> float:
        experts, layers = 12 * 16 * 2 * 768 * hidden, 12
        rows = tokens * top_k
        flops = 6 * rows * 2 * 768 * hidden * layers + 6 * tokens * 4 * 768 * 768 * layers
        sent = (Exchange(ep, rows * 768 * 2, 4 * layers, layers),) if ep > 1 else ()
        one = work(
            flops=flops, expert_share=0.5, row_bytes=rows * 768 * 2 * layers, exchanges=sent, message=2,
            dense=50e6 + (0 if ep > 1 else experts), experts=((ep, float(experts)),) if ep > 1 else (),
        )  # fmt: skip
        return sum(step_times(one, cluster, LIKELY._replace(imbalance=1.0)))

    assert step(8, 768, 4) > 1.1 * step(1, 768, 4)
    assert step(8, 24 * 768, 1) < step(1, 24 * 768, 1)


def test_experts_across_nodes_are_slower() -> None:
    cluster = Cluster(GPUS["h100"], 2, 8)
    inside, across = (work(experts=((ep, 800e6),), exchanges=(Exchange(ep, 80e6, 96, 24),)) for ep in (8, 16))
    assert sum(step_times(across, cluster, LIKELY)) > 2 * sum(step_times(inside, cluster, LIKELY))
