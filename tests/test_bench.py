"""The benchmarks' own arithmetic, and what they claim of the program: bytes, collectives, FLOPs, equal work."""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from commands import run_command
from modsquad_ds import cli
from modsquad_ds.bench import comm, step, step_profile
from modsquad_ds.bench.jobs import TAIL, JobError, last_lines, run_job
from modsquad_ds.bench.layer import DENSE, EXPERTS, SHARES, TOP_K, choices, layer_cases, sparse_layer, task_segments
from modsquad_ds.bench.layer_profile import AROUND, BETWEEN, OTHER, PARTS, PRODUCTS, WHOLE, parts_of, profile_layer
from modsquad_ds.bench.measure import environment, interleave, ratio, spread, timing_rows, write_rows
from modsquad_ds.bench.routing import steered
from modsquad_ds.bench.workload import DENSE as TIMM
from modsquad_ds.bench.workload import PACKED, PER_TASK, VARIANTS, Workload
from modsquad_ds.model import cached
from modsquad_ds.parallel import launch
from modsquad_ds.parallel.stock import StockLayer, offset_towards
from modsquad_ds.parallel.traffic import Call, Traffic

ROOT = Path(__file__).parents[1]
SMALL = Workload({"classes": (8, 32), "boxes": (4, 48), "masks": (4, 32)}, "tiny")._asdict()


# ---------------------------------------------------------------- measuring


def test_spread_and_ratio_by_hand() -> None:
    assert spread([3.0, 1.0, 2.0]) == (2.0, 1.0, 3.0)
    seconds = {"a": [2.0, 6.0, 3.0], "b": [1.0, 2.0, 2.0]}
    assert ratio(seconds, "a", "b") == (2.0, 1.5, 3.0), "of each round, not of the medians"
    rows = timing_rows(seconds, "b", width=4)
    assert rows[0] == {
        "case": "a", "width": 4, "seconds": 3.0, "seconds_min": 2.0, "seconds_max": 6.0,
        "peer": "b", "ratio": 2.0, "ratio_min": 1.5, "ratio_max": 3.0,
    }  # fmt: skip


def test_cases_take_turns_and_warm_up_is_dropped() -> None:
    order: list[str] = []
    seconds = interleave(
        {"slow": lambda: (order.append("slow"), time.sleep(0.02)), "quick": lambda: order.append("quick")},
        repeat=3, warmup=1, show=False,
    )  # fmt: skip
    assert order == ["slow", "quick", "quick", "slow", "slow", "quick", "quick", "slow"]
    assert [len(values) for values in seconds.values()] == [3, 3]
    assert min(seconds["slow"]) >= 0.02 > min(seconds["quick"])


def test_written_rows_say_where_they_come_from(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.json", "layer", [{"case": "a", "seconds": 1.0}])
    (row,) = json.loads((tmp_path / "rows.json").read_text())
    assert row["bench"] == "layer" and row["case"] == "a"
    assert row["torch"] == torch.__version__ and row["threads"] == torch.get_num_threads() and row["device"]
    assert set(environment()) >= {"modsquad_ds", "commit", "torch", "deepspeed", "python", "device", "cores", "threads"}


@pytest.mark.dist
def test_a_job_that_fails_tells_its_last_lines_and_one_that_hangs_ends() -> None:
    with pytest.raises(JobError, match=r"(?s)bench nothing on 1 rank\(s\) ended with exit code.*KeyError"):
        run_job("nothing", {}, 1, 60)
    began = time.monotonic()
    with pytest.raises(JobError, match="took longer than 1 s"):
        run_job("step_alone", {"variant": PACKED, **SMALL}, 1, 1.0)
    assert time.monotonic() - began < 20


def test_last_lines_of_a_job_leave_native_frames_out() -> None:
    frames = [f"frame #{i}: gloo::transport::tcp::Context::connect" for i in range(30)]
    output = "\n".join(["starting", "RuntimeError: no route to host", *frames, "<omitting python frames>", "", "killed"])
    assert last_lines(output) == ["starting", "RuntimeError: no route to host", "killed"]
    assert last_lines("\n".join(map(str, range(50)))) == [str(i) for i in range(50 - TAIL, 50)]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["layer", "--width", "wide"], "error: --width 'wide': expected whole numbers above 0, separated by commas"),
        (["comm", "--ranks", "1"], "error: --ranks 1: one rank sends nothing; take 2 or 4"),
        (["comm", "--ranks", "3"], "error: --ranks 3: the 16 MLP experts do not divide over them; take 2 or 4"),
        (["step", "--json", "here"], "error: --json here: is a folder; give a file's name"),
        (["step", "--json", "file/x.json"], "error: --json file: cannot be written to (File exists); give another folder"),
    ],
)
def test_a_users_mistake_is_one_line_before_anything_is_measured(arguments: list[str], told: str, tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "file").touch()
    found = run_command("bench", *arguments, cwd=tmp_path)
    assert found.returncode == 2
    assert found.stderr.strip().startswith(told) and len(found.stderr.strip().splitlines()) == 1


# ---------------------------------------------------------------- layer


@pytest.fixture
def one_process() -> Iterator[None]:
    """A process group of this process alone; what it tells the environment ends with it, or later programs would join in."""
    with mock.patch.dict(os.environ):
        launch.start()
        yield
        launch.stop()


@pytest.mark.usefixtures("one_process")
def test_all_layers_do_the_same_work() -> None:
    """The peers are the layer: from the same weights, the same outputs, for each routing. What is compared, is comparable."""
    width, tokens = 8, 30
    torch.manual_seed(0)
    layer, stock = sparse_layer(width), StockLayer(width, width, EXPERTS, TOP_K, None)
    for parameter in (*layer.parameters(), *stock.parameters()):
        torch.nn.init.normal_(parameter, std=0.3)
    x_SD = torch.randn(tokens, width)
    ex = layer.experts
    for number, expert in enumerate(stock.moe.deepspeed_moe.experts.deepspeed_experts):
        expert[0].weight.data, expert[0].bias.data = ex.fc1_weight.data[number], ex.fc1_bias.data[number]
        expert[2].weight.data, expert[2].bias.data = ex.fc2_weight.data[number], ex.fc2_bias.data[number]
    for name, expert_SK in choices(layer, x_SD, task_segments(tokens)).items():
        stock.gate.offset_SE = offset_towards(expert_SK, EXPERTS)
        found = stock(x_SD).detach()
        # Stock renormalises the gate weights of the chosen.
        logits = F.linear(x_SD, stock.gate.wg.weight)
        weight_SK = logits.gather(1, expert_SK).softmax(-1)
        assert_close(found, _through(ex, x_SD, expert_SK, weight_SK), atol=1e-4, rtol=1e-4, msg=name)
        with steered(layer, lambda router, prob_SE, chosen=expert_SK: chosen):
            y_SD, stats = layer(x_SD, task_segments(tokens))
        gate_SK = torch.cat([
            F.linear(x_SD[i : i + 1], layer.router.weight[_task(i, tokens)]).softmax(-1).gather(1, expert_SK[i : i + 1])
            for i in range(tokens)
        ])  # fmt: skip
        assert_close(y_SD.detach(), _through(ex, x_SD, expert_SK, gate_SK.detach()), atol=1e-4, rtol=1e-4, msg=name)
        assert stats.count_TE.sum() == tokens * TOP_K


def _task(token: int, tokens: int) -> int:
    bounds = [s.length for s in task_segments(tokens)]
    return 0 if token < bounds[0] else 1 if token < bounds[0] + bounds[1] else 2


def _through(experts: torch.nn.Module, x_SD: Tensor, expert_SK: Tensor, weight_SK: Tensor) -> Tensor:
    out = torch.zeros_like(x_SD)
    for s, k in ((s, k) for s in range(len(x_SD)) for k in range(expert_SK.shape[1])):
        w1, b1, w2, b2 = (getattr(experts, n).detach()[expert_SK[s, k]]
                          for n in ("fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias"))  # fmt: skip
        out[s] += weight_SK[s, k] * (w2 @ F.gelu(w1 @ x_SD[s] + b1) + b2)
    return out


def test_routings_by_hand() -> None:
    segments = task_segments(100)
    assert [s.length for s in segments] == [70, 20, 10] == [round(100 * share) for share in SHARES]
    found = choices(sparse_layer(8), torch.randn(100, 8), segments)
    assert torch.bincount(found["balanced"].flatten()).tolist() == [25] * EXPERTS
    assert torch.bincount(found["specialised"].flatten(), minlength=EXPERTS).tolist() == [70] * 4 + [20] * 4 + [10] * 4 + [0] * 4
    assert all(len(set(row)) == TOP_K for expert_SK in found.values() for row in expert_SK.tolist())


@pytest.mark.usefixtures("one_process")
def test_every_layer_runs_under_every_routing() -> None:
    cases = layer_cases(8, 40)
    seconds = interleave(cases, repeat=1, warmup=0, show=False)
    assert len(cases) == 1 + 3 * 4 and next(iter(cases)) == DENSE
    assert all(values[0] > 0 for values in seconds.values())


class Event(NamedTuple):
    """What the profile reads of an operation that was seen."""

    name: str
    self_cpu_time_total: float
    cpu_parent: Any = None


def test_parts_of_a_profile_by_hand() -> None:
    experts = Event("_MLP", 1000.0)
    seen = [experts, Event("aten::mm", 7000.0, experts), Event("aten::add_", 500.0, experts), Event("aten::mm", 250.0)]
    seen.append(Event("aten::scatter_add_", 125.0, Event("aten::index_add_", 0.0, experts)))
    assert parts_of(seen) == {
        PRODUCTS: 7.0, OTHER: 0.5, BETWEEN: 1.0, AROUND: 0.25, "rows added": 0.125, WHOLE: 8.875,
    }  # fmt: skip
    assert parts_of([Event("aten::mm", 250.0)]) == {PRODUCTS: 0.25, WHOLE: 0.25}, "a dense layer has no experts to be around"


def test_profile_has_all_parts_and_counts_the_products() -> None:
    rows = {row["part"]: row for row in profile_layer((16,), (64,), 1)}
    assert tuple(rows) == PARTS
    for layer in ("dense", "sparse"):
        assert sum(rows[part][layer] or 0.0 for part in PARTS[:-1]) == pytest.approx(rows[WHOLE][layer])
        # Each of two products of 64 tokens, 16 wide and 4 x 16, one way and two ways back, a multiplication and an addition.
        assert rows[PRODUCTS][f"{layer}_rate"] == pytest.approx(2 * 3 * 2 * 64 * 16 * 64 / 1e6 / rows[PRODUCTS][layer])
    assert rows[AROUND]["dense"] is None and rows["rows picked"]["dense"] is None
    assert min(row["sparse"] for row in rows.values()) > 0


# ---------------------------------------------------------------- step


@pytest.mark.dist
def test_a_step_of_every_variant() -> None:
    rows = run_job("step", {"repeat": 1, "ep_size": 2, "variants": VARIANTS, **SMALL}, 2, 240)
    assert [row["case"] for row in rows] == list(VARIANTS) and {row["ranks"] for row in rows} == {2}
    assert rows[0]["ratio"] == 1.0 and rows[1]["ratio"] == pytest.approx(rows[1]["seconds"] / rows[0]["seconds"])
    assert rows[0]["tokens"] == 8 * 4 + 4 * 9 + 4 * 4


def test_parts_of_a_step_by_hand() -> None:
    """Two passes: rows in both, then gradients reduced inside the last backward pass, then the optimizer and a sum."""
    span, traffic = step_profile.Span, Traffic()
    for kind, deepspeed, seconds in [
        ("rows", False, 1.0), ("all_reduce", False, 0.5), ("rows", False, 2.0), ("counts", False, 0.25), ("rows", False, 4.0),
        ("all_reduce", True, 8.0), ("all_gather", True, 16.0),
    ]:  # fmt: skip
        traffic.calls.append(Call(kind, deepspeed, 2, 1, 4, seconds))
    spans = [
        span("forward", 3.0, 1.5, 0, 1), span("backward", 5.0, 2.0, 2, 3), span("step", 0.0, 0.0, 3, 3),
        span("forward", 1.25, 1.0, 3, 4), span("allreduce_gradients", 9.0, 0.5, 5, 6), span("backward", 20.0, 6.5, 4, 6),
        span("step", 32.0, 3.0, 6, 7),
    ]  # fmt: skip
    found = step_profile.parts_of(spans, span(step_profile.WHOLE, 64.0, 16.0, 0, 7), traffic)
    assert tuple(found) == step_profile.PARTS
    assert list(found.values()) == [
        {"seconds": 3.0 + 1.25 - 1.25, "cpu": 2.5, "calls": 0},
        {"seconds": 25.0 - 9.0 - 6.0, "cpu": 8.0, "calls": 0},
        {"seconds": 7.25, "calls": 4},
        {"seconds": 9.0, "cpu": 0.5, "calls": 1},
        {"seconds": 32.0, "cpu": 3.0, "calls": 1},
        {"seconds": 64.0 - 3.0 - 10.0 - 7.25 - 9.0 - 32.0, "cpu": 2.0, "calls": 1},
        {"seconds": 64.0, "cpu": 16.0, "calls": 7},
    ]


def test_rows_of_a_step_profile_by_hand() -> None:
    """Of each round the mean over two ranks, then the median; what is saved is of each round too: of 1/2, 2/2 and 3/5."""

    def steps(*seconds: float) -> list[step_profile.Step]:
        return [{part: {"seconds": s, "cpu": s / 2, "calls": 3} for part in step_profile.PARTS} for s in seconds]

    packed, per_task = {PACKED: steps(1, 2, 5), PER_TASK: steps(2, 4, 8)}, {PACKED: steps(3, 2, 5), PER_TASK: steps(4, 4, 8)}
    rows = {row["part"]: row for row in step_profile.rows_of([packed, per_task])}
    assert tuple(rows) == step_profile.PARTS
    expected = {"packed": 2.0, "packed_cpu": 1.0, "packed_calls": 3, "per_task": 4.0, "per_task_cpu": 2.0, "per_task_calls": 3}
    assert rows[step_profile.FORWARD] == {"part": step_profile.FORWARD, **expected, "saved": 0.6, "saved_cpu": 0.6}
    assert not {"packed_cpu", "saved_cpu"} & rows[step_profile.DISPATCH].keys()


def test_profile_of_a_step_has_all_parts() -> None:
    with mock.patch.dict(os.environ):
        rows = {row["part"]: row for row in step_profile.measure_profile(1, 1, **SMALL) or ()}
    assert tuple(rows) == step_profile.PARTS and {(row["ranks"], row["tokens"]) for row in rows.values()} == {(1, 84)}
    for case in ("packed", "per_task"):
        assert sum(rows[part][case] for part in step_profile.PARTS[:-1]) == pytest.approx(rows[step_profile.WHOLE][case])
        assert min(rows[part][case] for part in step_profile.PARTS if part != step_profile.DISPATCH) > 0
        # One rank sends no rows; DeepSpeed reduces gradients and gathers weights all the same, once however many passes.
        assert rows[step_profile.DISPATCH][f"{case}_calls"] == rows[step_profile.OTHER][f"{case}_calls"] == 0
        assert rows[step_profile.REDUCTION][f"{case}_calls"] == 1


def test_profile_command_prints_and_writes_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = {"tokens": 84, "ranks": 2, "part": step_profile.FORWARD, "packed": 1.0, "per_task": 1.5, "saved": 0.123}
    monkeypatch.setattr(step_profile, "profile_step", lambda repeat: [told | {"repeat": repeat}])
    file = tmp_path / "rows.json"
    found = CliRunner().invoke(cli.app, ["bench", "step", "--profile", "--repeat", "4", "--json", str(file)])
    assert found.exit_code == 0 and "0.123" in found.output, found.output
    (row,) = json.loads(file.read_text())
    assert row["bench"] == "step --profile" and row["repeat"] == 4 and row.items() >= told.items()
    assert "--profile" in CliRunner().invoke(cli.app, ["bench", "step", "--help"], env={"COLUMNS": "200"}).output


def test_equal_active_flops_and_the_peak_of_a_step() -> None:
    """The sparse step does the dense one's work, within a tenth (one key-value head for all queries saves some)."""
    work = Workload({"classes": (2, 224)}, "tiny")._asdict()
    rows = {v: run_job("step_alone", {"variant": v, **work}, 1, 240)[0] for v in (PACKED, TIMM)}
    assert 0.85 < rows[PACKED]["flops"] / rows[TIMM]["flops"] < 1.05
    # 2 x 196 tokens, 12 blocks: 12 D^2 multiply-adds of weights and 2 N D of attention a token, three passes.
    by_hand = 3 * 2 * 392 * 12 * (12 * 192**2 + 2 * 196 * 192)
    assert rows[TIMM]["flops"] == pytest.approx(by_hand, rel=0.02)
    assert all(row["peak_mib"] > 1 and row["rest_mib"] > 100 for row in rows.values())


def test_flops_of_several_blocks_are_all_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward 2 and backward 4 matrix products of 30 x 4 rows, 8 x 8: also where an expert's rows are many blocks."""
    layer, x_SD = sparse_layer(8), torch.randn(30, 8, requires_grad=True)
    for block in (1024, 3):
        monkeypatch.setattr(cached, "BLOCK", block)
        with FlopCounterMode(display=False) as counter:
            layer(x_SD, task_segments(30))[0].sum().backward()
        router = 3 * 2 * 30 * 8 * EXPERTS
        assert counter.get_total_flops() == 6 * 2 * 30 * TOP_K * 8 * 8 + router


def test_peak_is_of_memory_held_since_the_last_look() -> None:
    rest = step.reset_peak()
    held = torch.ones(16 * 2**20)
    del held
    assert step.read_peak() - rest > 50
    assert step.read_peak() - step.reset_peak() > 30, "and is forgotten then"
    assert step.read_peak() - rest < 30
    small = [torch.ones(2**18) for _ in range(64)]  # what the C library keeps when it is freed
    del small
    assert step.reset_peak() - rest < 30


# ---------------------------------------------------------------- comm


def test_least_bytes_by_hand() -> None:
    """Two ranks, two experts, width 3: rank 0 sends 1 row away and gets 4, so in fp32, out and back, both passes: 5 rows."""
    counts_NPE = torch.tensor([[[2.0, 1], [4, 3]]])
    assert comm.least_bytes(counts_NPE, 3).tolist() == [2 * 4 * 3 * 5, 2 * 4 * 3 * 5]
    assert comm.padded_bytes(counts_NPE, 3) == 2 * 4 * 3 * 2 * (2 * 1 / 2) * 4, "every expert's part as long as the longest, 4"
    assert comm.busiest(counts_NPE) == pytest.approx(6 / 5)


def test_placed_experts_even_the_ranks_by_hand() -> None:
    """Three tasks with 70, 20, 10 tokens on 4 experts each: on 2 ranks 90:10 as numbered, 50:50 when placed."""

    class Router16:
        top_k, num_experts = 4, 16

    for placed, expected in ((False, [360, 40]), (True, [200, 200])):
        chosen = comm.specialised(Router16(), [70, 20, 10], 2, placed)(Router16(), torch.zeros(1))  # type: ignore[arg-type]
        assert torch.bincount(chosen.flatten(), minlength=16).view(2, 8).sum(1).tolist() == expected
        assert all(len(set(row)) == 4 for row in chosen.tolist())


@pytest.mark.dist
def test_no_byte_and_no_collective_too_many() -> None:
    """Of each sparse layer and pass: rows out and back in both directions, counts once; statistics once a pass."""
    work = Workload({"classes": (8, 64), "boxes": (4, 32), "masks": (4, 32)}, "tiny")
    rows = {(row["case"], row["routing"]): row for row in comm.bench_comm([2], work)}
    packed = rows["packed", "random"]
    assert packed["layers"] == 6 and packed["ratio"] == 1.0 and packed["mib"] == packed["least_mib"]
    assert (packed["row_calls"], packed["count_calls"], packed["stats_calls"]) == (6 * 4, 6, 1)
    tasks = rows[PER_TASK, "random"]
    assert (tasks["row_calls"], tasks["count_calls"], tasks["stats_calls"]) == (3 * 6 * 4, 3 * 6, 3)
    spread_too = rows["attention spread too", "random"]
    assert (spread_too["row_calls"], spread_too["count_calls"], spread_too["ratio"]) == (6 * 4 + 6 * 8, 12, 1.0)
    capacity = rows["capacity 1.25", "random"]
    assert (capacity["row_calls"], capacity["count_calls"]) == (6 * 4, 0)
    specialised, placed = rows["packed", "specialised"], rows["experts placed", "specialised"]
    assert specialised["ratio"] == placed["ratio"] == 1.0
    assert specialised["padded"] > 2 and specialised["busiest"] > 1.6 and placed["busiest"] < 1.1
