"""The recipe: everything a run depends on, typed and strict. Checks what recipe_tree.py has read; saved with the run.

Values that can be derived from others are derived (hidden sizes, head widths), so a recipe states few numbers. Errors name
the key's full path.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator
from typing_extensions import Self

from modsquad_ds.adapt_spec import AdaptSpec, InitSpec
from modsquad_ds.errors import UserError
from modsquad_ds.location import DataPlace
from modsquad_ds.model_spec import ModelSpec
from modsquad_ds.recipe_tree import read_tree
from modsquad_ds.tasks import CLASSIFICATION, TASK_KINDS, ImageSet, Strict, TaskSpec, completed_set_task

# ---------------------------------------------------------------- objective, training


class LossSpec(Strict):
    """What is minimised: weighted task losses plus terms on the routing."""

    weighting: Literal["fixed", "uncertainty"] = "fixed"
    """`fixed`: each task's loss_weight. `uncertainty`: learned, on top of it (Mod-Squad)."""
    mutual_information: float = Field(0.0, ge=0)
    """Weight of -I(task; expert), summed over the sparse layers."""
    memory: float = Field(0.99, ge=0, lt=1)
    """Decay per micro-batch of the remembered P(expert | task), which stands in for tasks that are absent from a step."""
    load_balance: float = Field(0.0, ge=0)
    """Weight of the Switch load-balance loss, summed over the sparse layers."""
    z_loss: float = Field(0.0, ge=0)
    """Weight of the router z-loss (mean squared logsumexp of the router's logits), summed over the sparse layers."""


class OptimizerSpec(Strict):
    """Optimizer, learning rate and what is done to gradients."""

    type: Literal["adamw", "lamb"] = "adamw"
    lr: float = Field(gt=0)
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = Field(0.05, ge=0)
    """Not applied to biases, norms, position and task embeddings."""
    layer_decay: float = Field(1.0, gt=0, le=1)
    """Learning-rate factor per block, counted from the head downwards."""
    clip: float = Field(0.0, ge=0)
    """Largest global gradient norm; 0 turns clipping off."""


class ScheduleSpec(Strict):
    """Learning rate over the steps, as a multiple of the peak."""

    type: Literal["cosine", "onecycle"] = "cosine"
    warmup: int = Field(0, ge=0)
    """Cosine: steps of linear warm-up."""
    final: float = Field(0.0, ge=0, le=1)
    """Cosine: share of the peak at the end."""
    rise: float = Field(0.3, gt=0, lt=1)
    """OneCycle: share of the steps before the peak."""
    start_div: float = Field(25.0, gt=0)
    """OneCycle: peak / first learning rate."""
    final_div: float = Field(1e4, gt=0)
    """OneCycle: first / last learning rate."""


class TrainSpec(Strict):
    """The loop."""

    steps: int = Field(gt=0)
    sampling: Literal["packed", "weighted"] = "packed"
    """`packed`: every step holds a sub-batch of every task. `weighted`: one task per step, drawn by sampling_weight."""
    accumulation: int = Field(1, gt=0)
    """Micro-batches per optimizer step."""
    optimizer: OptimizerSpec
    schedule: ScheduleSpec = ScheduleSpec()
    ema: float = Field(0.0, ge=0, lt=1)
    """Decay of an exponential moving average of the weights, which the model file then holds; 0 turns it off."""
    checkpoint_every: int = Field(0, ge=0)
    """Steps between training checkpoints; 0 writes one at the end only."""
    checkpoint_minutes: float = Field(0.0, ge=0)
    """A checkpoint too when this long has passed since the last one: the most work that a crash can cost; 0 turns it off."""
    keep_checkpoints: int = Field(2, gt=0)
    log_every: int = Field(10, gt=0)
    workers: int = Field(4, ge=0)
    """Data loading processes per rank; 0 loads in the training process."""
    shuffle_window: int = Field(4, gt=0)
    """Shards whose samples are mixed at a time."""


class ParallelSpec(Strict):
    """How the model lies on the ranks."""

    ep_size: int = Field(1, gt=0)
    """Ranks that share the MLP experts of one copy of the model. Divides the world size and the number of experts."""
    attention_ep_size: int = Field(1, gt=0)
    """The same for attention experts; they are small, so by default every rank holds them all."""
    placement: Literal["fixed", "balanced"] = "fixed"
    """Which experts lie on which rank. `fixed`: as they are numbered. `balanced`: when a run goes on from a checkpoint, experts
    are numbered anew so that the ranks of a group get about the same number of rows, by the checkpoint's usage and the tasks'
    tokens per step; a fresh run has no usage yet. The network stays the same, so the curve goes on as with `fixed` up to
    rounding, not bit for bit; `model.router.noise` is drawn by number, so with it, it is another random draw."""
    capacity_factor: float | None = Field(None, gt=0)
    """None: every token reaches all its top_k experts. A number: while training, an expert takes at most
    ceil(capacity_factor * tokens * top_k / num_experts) of a rank's tokens, those with the highest gate weights. All transfers
    then have a fixed size and the host never waits to learn it."""
    expect_world_size: int | None = Field(None, gt=0)
    """Ranks that training is meant to have; with any other number it is refused. slurm/train.sbatch sets it: some launchers start
    fewer than they were asked for and say nothing."""
    collective_timeout: float = Field(600.0, ge=2)
    """Seconds in which some rank has to get on (a step, a file saved): after that the job ends, and the rank that the others wait
    for is named. So is a rank that is gone, after this time or a minute, whichever is less."""

    @model_validator(mode="before")
    @classmethod
    def _in_seconds(cls, given: Any) -> Any:
        """Model files and checkpoints from before the limit was in seconds."""
        minutes = given.get("timeout_minutes") if isinstance(given, Mapping) else None
        if not isinstance(minutes, int | float):
            return given
        rest = {key: value for key, value in given.items() if key != "timeout_minutes"}
        return {"collective_timeout": 60.0 * minutes, **rest}


class LogSpec(Strict):
    """Where records go besides RUN/metrics.jsonl."""

    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    """`auto`: online where a key is set, else offline."""
    wandb_project: str = "modsquad_ds"


class CacheSpec(Strict):
    """Shards that come by URL, kept on this node's disk for all its processes."""

    folder: Path | None = None
    """On a disk of the node, of one user. None: `$MODSQUAD_SCRATCH/shard-cache`, else `modsquad-shards-UID` in `$TMPDIR` or /tmp.
    Commands on a model file take the default, since the file may come from another machine."""
    gigabytes: float = Field(50.0, gt=0)
    """Bound (10^9 bytes): beyond it the shards go whose last use is longest ago, those that no process has open first."""
    ahead: int = Field(1, ge=0)
    """Shuffle windows that are fetched before they are read; 0 fetches what is read alone."""
    tries: int = Field(6, gt=0)
    """A file that cannot be had after so many tries, with growing waits between them, ends the job."""
    stall_seconds: float = Field(30.0, gt=0)
    """A transfer that brings next to nothing for so long, or at most twice as long, is broken off and tried again."""


class Recipe(Strict):
    """A whole run."""

    name: str
    run: Path
    """Folder of this run's outputs."""
    data_root: DataPlace = Path()
    """Folder or URL that relative `data:` paths of tasks start from."""
    cache: CacheSpec = CacheSpec()
    seed: int = Field(0, ge=0)
    deepspeed_config: str = "zero2"
    """Name of a file in ds_configs/, or a path to a DeepSpeed JSON."""
    resume: Literal["auto", "never", "must"] = "auto"
    """`auto`: go on from the run's newest complete checkpoint if there is one. `must`: refuse to start without one."""
    only: tuple[str, ...] = ()
    """Train these of the tasks alone; empty means all."""
    mean: tuple[float, float, float] = (123.675, 116.28, 103.53)
    """Mean of the pixels' channels (RGB, 0 to 255), and their standard deviation."""
    std: tuple[float, float, float] = (58.395, 57.12, 57.375)
    model: ModelSpec
    sets: dict[str, ImageSet] = Field(default_factory=dict)
    """Images that several tasks have labels on."""
    tasks: dict[str, TaskSpec] = Field(min_length=1)
    loss: LossSpec = LossSpec()
    train: TrainSpec
    parallel: ParallelSpec = ParallelSpec()
    log: LogSpec = LogSpec()
    init_from: InitSpec | None = None
    """Start from a file's weights instead of random ones."""
    adapt: AdaptSpec = AdaptSpec()

    @model_validator(mode="before")
    @classmethod
    def _complete_set_tasks(cls, given: Any) -> Any:
        """Tasks of an image set take from it, and from their rows, what they do not say themselves."""
        tasks, sets = (given.get(key) for key in ("tasks", "sets")) if isinstance(given, Mapping) else (None, None)
        if not isinstance(tasks, Mapping):
            return given
        of_sets = {name: task for name, task in tasks.items() if isinstance(task, Mapping) and "set" in task}
        sets = sets if isinstance(sets, Mapping) else {}
        return {**given, "tasks": {**tasks, **{n: completed_set_task(n, task, sets) for n, task in of_sets.items()}}}

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        unknown = [name for name in self.only if name not in self.tasks]
        if unknown:
            raise ValueError(f"only names {', '.join(unknown)}, not among tasks: {', '.join(self.tasks)}")
        if both := self.sets.keys() & self.tasks.keys():
            raise ValueError(f"{min(both)} names a set and a task: give them different names")
        for name in (*self.tasks, *self.sets):
            if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
                what = "task" if name in self.tasks else "set"
                raise ValueError(f"{what} name {name!r}: use lower-case letters, digits and _ (it names folders and parameters)")
        strange = [name for name in self.adapt.tasks if name not in self.active]
        if strange:
            raise ValueError(f"adapt.tasks names {', '.join(strange)}, not among this run's tasks: {', '.join(self.active)}")
        pruned_at = self.adapt.prune.at_step if self.adapt.prune is not None else None
        if pruned_at is not None and pruned_at > self.train.steps:
            raise ValueError(f"adapt.prune.at_step {pruned_at} is after the last of train.steps {self.train.steps}")
        if self.adapt.router_steps >= self.train.steps:
            raise ValueError(f"adapt.router_steps {self.adapt.router_steps} leaves none of train.steps {self.train.steps}")
        router_stays = self.model.router.per_task or (self.adapt.train == "heads" and self.adapt.prune is None)
        if not router_stays and len(self.adapted) < len(self.active):
            raise ValueError("adapt.tasks: with one router for all tasks (model.router.per_task) others would change too")
        if (self.adapt.train != "all" or self.adapt.router_steps) and self.parallel.placement == "balanced":
            raise ValueError("parallel.placement balanced moves experts, which a network that is partly frozen cannot; use fixed")
        for key, ep, moe in (
            ("ep_size", self.parallel.ep_size, self.model.mlp),
            ("attention_ep_size", self.parallel.attention_ep_size, self.model.attention),
        ):
            for count in moe.counts:
                if count % ep:
                    raise ValueError(f"parallel.{key} {ep} does not divide the {count} experts of a layer")
        return self

    @property
    def active(self) -> dict[str, TaskSpec]:
        """The tasks of this run's network, in the recipe's order."""
        return {name: spec for name, spec in self.tasks.items() if not self.only or name in self.only}

    @property
    def adapted(self) -> dict[str, TaskSpec]:
        """Those of them that learn and whose data are loaded, in the recipe's order."""
        return {name: spec for name, spec in self.active.items() if not self.adapt.tasks or name in self.adapt.tasks}


# ---------------------------------------------------------------- reading


def load_recipe(recipe: str, overrides: Iterable[str] = ()) -> Recipe:
    """A shipped recipe's name or a YAML file, with `key=value` overrides (`recipe_tree.read_tree`).

    Raises UserError with the file, the key's path, what was expected and, for unknown keys, the nearest known one.
    """
    return recipe_from_tree(read_tree(recipe, overrides), recipe)


def recipe_from_tree(tree: Mapping[str, Any], where: str) -> Recipe:
    """The recipe held by a plain mapping, e.g. read from JSON; `where` names its origin in errors."""
    try:
        return Recipe.model_validate(dict(tree))
    except ValidationError as error:
        raise UserError(f"recipe {where}: " + "; ".join(map(_one_line, _each_once(error.errors())))) from None


def recipe_to_tree(recipe: Recipe) -> dict[str, Any]:
    """Plain JSON-able mapping that `recipe_from_tree` turns back into the same recipe.

    What an image set says for its tasks stands there alone, so that it can be changed in one place.
    """
    tree = recipe.model_dump(mode="json")
    for task in tree["tasks"].values():
        if "set" in task:
            for key in ImageSet.model_fields:
                del task[key]
    return tree


def _each_once(errors: Sequence[Any]) -> list[Any]:
    """pydantic's findings, but what every task of an image set takes from it is told of the set alone."""
    of_sets = [(error["loc"][2:], error["msg"]) for error in errors if error["loc"][:1] == ("sets",)]
    return [e for e in errors if e["loc"][:1] != ("tasks",) or (e["loc"][3:], e["msg"]) not in of_sets]


def _one_line(error: Any) -> str:
    """One of pydantic's findings as `path: what (given ...)`."""
    location = [str(part) for part in error["loc"]]
    path = ".".join(part for i, part in enumerate(location) if not _is_tag(location[:i], part)) or "recipe"
    if error["type"] == "extra_forbidden":
        known = sorted(_known_keys())
        near = [] if location[-1] in known else get_close_matches(location[-1], known, n=1)
        return f"{path}: unknown key" + (f"; did you mean {near[0]}?" if near else "")
    if error["type"] == "missing":
        return f"{path}: missing; this key is required"
    if error["type"] == "union_tag_not_found":
        return f"{path}.{error['ctx']['discriminator'].strip(chr(39))}: missing; this key is required"
    given = error["input"]
    shown = "" if isinstance(given, Mapping | Strict) else f" (given {given!r})"
    return f"{path}: {error['msg'].removeprefix('Value error, ')}{shown}"


def _is_tag(before: list[str], part: str) -> bool:
    """Whether pydantic, not the user, put this part into a location: the kind of a task or the type of a head."""
    if len(before) == 2:
        return before[0] == "tasks" and part in TASK_KINDS
    return len(before) == 4 and before[3] == "head" and before[2] != CLASSIFICATION


def _known_keys() -> set[str]:
    """Every field name of every recipe section."""
    todo: list[type[Strict]] = list(Strict.__subclasses__())
    names: set[str] = set()
    while todo:
        section = todo.pop()
        names.update(section.model_fields)
        todo.extend(section.__subclasses__())
    return names
