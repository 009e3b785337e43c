"""From a recipe to what the loader has to do on one rank. Shared by train.py and evaluate.py."""

from collections.abc import Mapping, Sequence

from modsquad_ds.config import Recipe
from modsquad_ds.data.loader_plan import TRAIN, LoaderPlan
from modsquad_ds.data.order import Sampling
from modsquad_ds.data.shards import ShardSet
from modsquad_ds.errors import UserError
from modsquad_ds.parallel.collectives import gather_json
from modsquad_ds.parallel.ranks import Ranks
from modsquad_ds.tasks import SetTask, TaskSpec, streams_of


def loader_plan(recipe: Recipe, ranks: Ranks, tasks: Mapping[str, TaskSpec] | None = None) -> LoaderPlan:
    """What the recipe says about data, for this rank; of all its tasks, or of some."""
    return LoaderPlan(
        tasks=dict(recipe.active if tasks is None else tasks),
        root=recipe.data_root,
        seed=recipe.seed,
        sampling=recipe.train.sampling,
        shuffle_window=recipe.train.shuffle_window,
        patch_size=recipe.model.shape.patch,
        mean=recipe.mean,
        std=recipe.std,
        rank=ranks.rank,
        world=ranks.world,
        accumulation=recipe.train.accumulation,
        cache=recipe.cache,
    )


def check_same_shards(plan: LoaderPlan, splits: Sequence[str]) -> None:
    """UserError on all ranks where they see different shards: samples would be lost and others met twice, in silence.

    Shards at a URL may be replaced while a job starts, and copies on the nodes' own disks may differ. Every rank calls it.
    """
    stores = {f"{tasks[0]}/{split}": plan.store(tasks[0], split) for tasks in plan.streams.values() for split in splits}
    found = {name: store.fingerprint for name, store in stores.items() if isinstance(store, ShardSet)}
    everyone = gather_json(found)
    for name in found:
        others = [rank for rank, theirs in enumerate(everyone) if theirs[name] != everyone[0][name]]
        if others:
            task, split = name.split("/")
            raise UserError(
                f"{plan.section(task)}.data: rank {others[0]} sees other shards than rank 0 in {plan.folder(task, split)}: they "
                "were replaced while the job started, or the nodes have different copies; start again, or copy them again"
            )


def step_tokens(plan: LoaderPlan) -> tuple[float, ...]:
    """Mean tokens of each task in an optimizer step, over all ranks and micro-batches, in the recipe's order.

    With `weighted` sampling a task's steps are its share of the sampling weights. Of an image set only those images count that
    have the task's label.
    """
    shares, labelled = step_shares(plan.tasks, plan.sampling), _labelled(plan)
    return tuple(
        shares[name] * labelled.get(name, 1.0) * plan.step_images(name) * image_tokens(spec, plan.patch_size)
        for name, spec in plan.tasks.items()
    )


def _labelled(plan: LoaderPlan) -> dict[str, float]:
    """Share of the training images of its set that a task has a label on."""
    found: dict[str, float] = {}
    for set_tasks in plan.streams.values():
        specs = {name: spec for name in set_tasks if isinstance(spec := plan.tasks[name], SetTask)}
        if specs:
            store = plan.store(set_tasks[0], TRAIN)
            found |= {name: store.details["targets"][spec.target] / sum(store.shard_sizes) for name, spec in specs.items()}
    return found


def step_shares(tasks: Mapping[str, TaskSpec], sampling: Sampling) -> dict[str, float]:
    """Share of the steps that hold a task. The tasks of an image set come together."""
    streams = streams_of(tasks)
    total = sum(tasks[names[0]].sampling_weight for names in streams.values())
    return {
        name: 1.0 if sampling == "packed" else tasks[name].sampling_weight / total
        for names in streams.values()
        for name in names
    }


def image_tokens(spec: TaskSpec, patch: int) -> float:
    """Mean tokens of a training image of the task."""
    sizes = spec.transform.train_sizes
    return sum((height // patch) * (width // patch) for height, width in sizes) / len(sizes)
