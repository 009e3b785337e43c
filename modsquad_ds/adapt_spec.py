"""The recipe's `init_from:` and `adapt:` sections: where weights come from, and what of them learns. Part of the recipe."""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from modsquad_ds.tasks import Strict


class InitSpec(Strict):
    """A file to start from: a model file (or a run folder), or the weights of a timm vision transformer."""

    path: Path
    """As seen from the working directory: RUN/, model.safetensors, or a timm ViT's state dict (.safetensors, or .pth, read
    without running code of it). What it is, its content tells."""
    allow: tuple[Literal["tasks", "experts", "tensors"], ...] = ()
    """Differences that are meant. `tasks`: tasks of one side that the other lacks (this run's start at random, the file's are
    left). `experts`: other numbers of experts. `tensors`: any other tensor of one side that the other lacks. What a ViT never
    has (heads, routers, task embeddings), and its class token and classifier, need no leave."""
    upcycle: Literal["slice", "copy"] = "slice"
    """How a dense MLP becomes experts. `slice`: each expert is a slice of its hidden units. `copy`: each is all of it. Either
    computes what the dense MLP does at step 0 where `router.renormalize` is on and top_k a multiple of the number of slices that
    make it whole (as with the default `mlp.hidden`); upcycle.py has the other cases."""

    @model_validator(mode="before")
    @classmethod
    def _from_path(cls, value: Any) -> Any:
        """`init_from: runs/quickstart` is short for `init_from: {path: runs/quickstart}`."""
        return {"path": value} if isinstance(value, str | Path) else value


class PruneSpec(Strict):
    """Take away the experts that the adapted tasks use little. Exactly one of the first three."""

    min_usage: float | None = Field(None, gt=0, lt=1)
    """Keep experts that are among the top-k of at least this share of a task's tokens (Mod-Squad's rule; its value is 0.03)."""
    keep: int | None = Field(None, gt=0)
    """Keep this many experts of each layer, the most used."""
    keep_params: float | None = Field(None, gt=0, le=1)
    """Keep about this share of the experts' parameters, the most used of all layers."""
    at_step: int | None = Field(None, gt=0)
    """Step after which routers no longer see the others and the rest goes on learning; None: after the last step."""

    @model_validator(mode="after")
    def _one_rule(self) -> Self:
        if sum(rule is not None for rule in (self.min_usage, self.keep, self.keep_params)) != 1:
            raise ValueError("give exactly one of min_usage, keep and keep_params")
        return self


class AdaptSpec(Strict):
    """Fine-tuning with fewer trained parameters, fewer model parameters, or both. Less computation: lower model.*.top_k."""

    train: Literal["heads", "routers", "routers+heads", "experts", "all"] = "all"
    """What learns, of the adapted tasks: their heads; their routers and task embeddings; both; both and some experts; or the
    whole network. All else is frozen: its bytes stay, it has no optimizer state, and no gradient of it is communicated."""
    experts: int | None = Field(None, gt=0)
    """`train: experts`: how many of each sparse layer learn; default 1, and all with `choose: added`."""
    choose: Literal["best", "worst", "added"] = "best"
    """Which: those that the adapted tasks use most (tasks not seen yet go by this run's others), those they use least, or those
    that no other task sees (`expand` adds such)."""
    tasks: tuple[str, ...] = ()
    """The adapted tasks. The run loads data for these alone; empty means all of the run's tasks."""
    router_steps: int = Field(0, ge=0)
    """Steps at the start in which routers, task embeddings and heads learn alone; experts are chosen by usage at their end."""
    concentrate: float = Field(0.0, ge=0)
    """Weight of a loss that draws the adapted tasks' routing to the experts they already use most, so that more can be pruned
    (heterogeneous follow-up's fine-tuning term): cross entropy of the routing with its own moving average, sum over layers."""
    prune: PruneSpec | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.router_steps and self.train not in ("experts", "all"):
            raise ValueError(f"router_steps trains routers first and then more; with train {self.train} nothing more follows")
        return self
