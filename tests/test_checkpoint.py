"""Training checkpoints: bit for bit at the same topology, close at another, complete or not there, and plain about damage."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from lives import resume, save
from modsquad_ds import checkpoint
from modsquad_ds.config import Recipe, recipe_to_tree
from modsquad_ds.errors import UserError
from modsquad_ds.parallel import launch
from modsquad_ds.parallel.state import step_count
from modsquad_ds.placement import Move
from modsquad_ds.trainer import build_trainer
from ranks import run_ranks
from small import small_recipe
from test_topology import config_file, one_step

SPLIT, STEPS = 3, 6


def recipe_of(run: str, ep: int, config: str, **changes: object) -> Recipe:
    return small_recipe(**{
        "run": run, "parallel.ep_size": ep, "parallel.attention_ep_size": ep, "deepspeed_config": config,
        "train.optimizer.clip": 1.0, "train.steps": STEPS, **changes,
    })  # fmt: skip


def through(rank: int, world: int, recipe: Recipe) -> list[list[float]]:
    """All steps in one life, saving in the middle."""
    trainer = build_trainer(recipe, launch.start())
    values = []
    for step in range(STEPS):
        values.append(one_step(trainer, step))
        if step + 1 == SPLIT:
            save(trainer, SPLIT)
    return values


def resumed(rank: int, world: int, recipes: list[Recipe]) -> list[list[list[float]]]:
    """The steps after the checkpoint, each recipe from its own fresh start."""
    ranks = launch.start()
    curves = []
    for recipe in recipes:
        trainer = build_trainer(recipe, ranks)
        start = resume(trainer)
        curves.append([one_step(trainer, step) for step in range(start, STEPS)])
    return curves


@pytest.mark.dist
def test_resume_at_the_same_and_at_other_topologies(tmp_path: Path) -> None:
    configs = {stage: config_file(tmp_path, stage) for stage in (1, 2)}
    run = str(tmp_path / "run")
    extra = {"train.ema": 0.5, "model.drop_path": 0.2, "model.router.noise": 1.0}
    first = recipe_of(run, 2, configs[2], **extra)
    whole = run_ranks(2, through, first)[0]
    same = run_ranks(2, resumed, [first])[0][0]
    assert same == whole[SPLIT:], "bit for bit"

    # Without randomness per rank, any topology goes on with the same curve.
    calm = recipe_of(str(tmp_path / "calm"), 2, configs[2], **{"train.ema": 0.5})
    whole = run_ranks(2, through, calm)[0]
    other = [recipe_of(str(tmp_path / "calm"), 1, configs[1], **{"train.ema": 0.5, "parallel.attention_ep_size": 2})]
    alone = recipe_of(str(tmp_path / "calm"), 1, configs[1], **{"train.ema": 0.5})
    for curve in (run_ranks(2, resumed, other)[0][0], run_ranks(1, resumed, [alone])[0][0]):
        for a, b in zip(curve, whole[SPLIT:], strict=True):
            assert a == pytest.approx(b, rel=2e-5, abs=2e-5)


def one_process(rank: int, world: int, folder: str) -> list[str]:
    """What needs an engine but no second rank, told as findings."""
    root = Path(folder)
    run = root / "run"
    config = config_file(root, 2)
    ranks = launch.start()
    recipe = recipe_of(str(run), 1, config)
    trainer = build_trainer(recipe, ranks)
    assert resume(trainer) == 0
    with pytest.raises(UserError, match="resume=must: no complete checkpoint"):
        resume(build_trainer(recipe_of(str(run), 1, config, resume="must"), ranks))
    for step in range(3):
        one_step(trainer, step)
        save(trainer, step + 1)
    kept = [p.name for p in checkpoint.complete_checkpoints(run)]
    newest = checkpoint.folder_of(run, 3)
    with pytest.raises(UserError, match=r"resume=never: .*step-00000003 exists"):
        resume(build_trainer(recipe_of(str(run), 1, config, resume="never"), ranks))

    (run / "checkpoints" / ".partial-step-00000009").mkdir()
    (run / "checkpoints" / "step-00000008").mkdir()
    assert checkpoint.complete_checkpoints(run)[-1] == newest, "what has no index is not a checkpoint"

    wider = recipe_of(str(run), 1, config, **{"model.mlp": {"num_experts": 4, "top_k": 2, "hidden": 16}})
    with pytest.raises(UserError, match=r"fc1_bias has shape \(4, 24\) there and \(4, 16\) in this recipe"):
        resume(build_trainer(wider, ranks))
    with pytest.raises(UserError, match=r"tasks digits, scenes, textures in this order, the recipe has textures, digits, scenes"):
        resume(build_trainer(reordered(recipe), ranks))
    with pytest.raises(UserError, match=r"step-00000003: holds no average of the weights; resume with train.ema=0"):
        resume(build_trainer(recipe_of(str(run), 1, config, **{"train.ema": 0.5}), ranks))
    with pytest.raises(UserError, match=r"3 steps are done, train.steps is 2"):
        resume(build_trainer(recipe_of(str(run), 1, config, **{"train.steps": 2}), ranks))
    for damage, message in DAMAGE.items():
        copy = root / damage
        shutil.copytree(checkpoint.folder_of(run, 3), checkpoint.folder_of(copy, 3))
        damaged(checkpoint.folder_of(copy, 3), damage)
        with pytest.raises(UserError, match=message):
            resume(build_trainer(recipe.model_copy(update={"run": copy}), ranks))
    return kept


def reordered(recipe: Recipe) -> Recipe:
    """The same tasks in another order: every tensor has the shape of the checkpoint's."""
    return recipe.model_copy(update={"tasks": {name: recipe.tasks[name] for name in ("textures", "digits", "scenes")}})


DAMAGE = {
    "truncated": r"no checkpoint under .* is whole \(.*rank-00000.safetensors has \d+ of \d+ bytes",
    "flipped": r"no checkpoint under .* is whole \(.*rank-00000.safetensors differs from its checksum",
    "gone": r"no checkpoint under .* is whole \(.*shared.safetensors cannot be read \(No such file",
    "json": r"no checkpoint under .* is whole \(.*state.json cannot be read",
    "edited": r"no checkpoint under .* is whole \(.*state.json differs from its checksum",
    "format": "format 99, this version reads 3",
}


def damaged(folder: Path, how: str) -> None:
    """Spoil a checkpoint."""
    state, part = folder / "state.json", folder / "rank-00000.safetensors"
    content, data = json.loads(state.read_text()), bytearray(part.read_bytes())
    match how:
        case "truncated":
            part.write_bytes(data[: len(data) // 2])
        case "flipped":
            data[-5] ^= 1
            part.write_bytes(data)
        case "gone":
            (folder / "shared.safetensors").unlink()
        case "json":
            state.write_text("{")
        case "edited":
            state.write_text(json.dumps(content | {"step": 2}))
        case "format":
            state.write_text(json.dumps(content | {"format": 99}))


def test_keeping_refusing_and_damage(tmp_path: Path) -> None:
    (kept,) = run_ranks(1, one_process, str(tmp_path))
    assert kept == ["step-00000002", "step-00000003"]


def test_a_removed_checkpoint_loses_its_name_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed in the middle of removing, it must not pass for complete."""
    folder = checkpoint.folder_of(tmp_path, 1)
    folder.mkdir(parents=True)
    (folder / "state.json").write_text("{}")
    assert checkpoint.complete_checkpoints(tmp_path) == [folder]
    seen: list[list[Path]] = []
    real = shutil.rmtree

    def watched(path: Path, **settings: bool) -> None:
        if path.exists():
            seen.append(checkpoint.complete_checkpoints(tmp_path))
        real(path, **settings)

    monkeypatch.setattr(shutil, "rmtree", watched)
    checkpoint._remove(folder)
    assert seen == [[]] and not list(folder.parent.iterdir())


def test_parts_of_a_tensor_come_out_of_the_pieces_they_lie_in(tmp_path: Path) -> None:
    """A tensor of three experts with two elements each, 0 to 5, which two ranks wrote as 0 to 3 and 4 to 5."""
    for rank, (first, last) in enumerate(((0, 4), (4, 6))):
        index = json.dumps([("0", "w", "weight", first, last - first)])
        checkpoint.write_tensors(tmp_path / f"{rank}", {"0": torch.arange(first, last).float()}, {"pieces": index})
    content = {"shapes": {"w": [3, 2]}, "files": [{"file": "0"}, {"file": checkpoint.SHARED}, {"file": "1"}]}
    reader = checkpoint._Reader(tmp_path, content, {})
    for start in range(6):
        for stop in range(start + 1, 7):
            assert reader.cut("w", "weight", start, stop).tolist() == list(range(start, stop))
    turned = checkpoint._Reader(tmp_path, content, {"w": Move(0, (2, 0, 1))})
    assert turned.cut("w", "weight", 1, 5).tolist() == [5, 0, 1, 2]
    half = checkpoint._Reader(tmp_path, {**content, "files": content["files"][:1]}, {})
    assert half.cut("w", "weight", 0, 4).tolist() == [0, 1, 2, 3]
    with pytest.raises(UserError, match="weight of w has 1 of 3 elements; use an older checkpoint"):
        half.cut("w", "weight", 3, 6)


def test_what_a_killed_job_left_is_cleared_and_nothing_else(tmp_path: Path) -> None:
    whole = checkpoint.folder_of(tmp_path, 1)
    for folder in (whole, checkpoint.partial_of(checkpoint.folder_of(tmp_path, 2))):
        folder.mkdir(parents=True)
    for name in ("model.safetensors", ".partial-model.safetensors-77", ".partial-metrics.jsonl-8", ".partial-evaluation.json-9"):
        (tmp_path / name).touch()
    checkpoint.clear_remains(tmp_path)
    left = {".partial-evaluation.json-9", "checkpoints", "model.safetensors"}  # an evaluation may be at work beside training
    assert {path.name for path in tmp_path.iterdir()} == left and list((tmp_path / "checkpoints").iterdir()) == [whole]


@pytest.mark.parametrize("fused", [False, True])
def test_steps_are_counted_where_the_optimizer_wants_them(fused: bool) -> None:
    """A fused optimizer on a GPU takes no count that lies on the host."""
    parameter = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.AdamW([parameter], fused=fused)
    count = step_count(7, optimizer, torch.empty(2, device="meta"))
    assert count.device.type == ("meta" if fused else "cpu")
    assert fused or count.item() == 7.0
    parameter.grad = torch.ones(2)
    optimizer.step()
    assert optimizer.state[parameter]["step"].dtype == count.dtype


def test_saved_recipe_and_steps(tmp_path: Path) -> None:
    recipe = recipe_of(str(tmp_path / "run"), 1, config_file(tmp_path, 2))
    run_ranks(1, through, recipe)
    state = checkpoint.read_state(checkpoint.folder_of(tmp_path / "run", SPLIT))
    assert state["step"] == state["optimizer_step"] == SPLIT
    assert state["recipe"] == recipe_to_tree(recipe)
