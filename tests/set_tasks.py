"""Tasks of image sets, one for each kind and loss, with predictions and targets that need no files."""

from typing import Any, NamedTuple

import torch
from pydantic import TypeAdapter
from torch import Tensor

from modsquad_ds.tasks import SetTask, TaskSpec, completed_set_task

IMAGES, SIZE = 3, (4, 6)


class Case(NamedTuple):
    """A kind of task with one of its losses, on one of its targets."""

    kind: str
    loss: str
    target: str

    def __str__(self) -> str:
        return f"{self.target}-{self.loss}"

    def spec(self, **changes: Any) -> SetTask:
        """The recipe's task; `changes` go into its section."""
        return set_task(self.target, loss=self.loss, **changes)


def set_task(target: str, **changes: Any) -> SetTask:
    """A task of an image set as a recipe gives it."""
    tree = completed_set_task(target, {"set": "views", **changes}, {"views": {"data": "unused", "batch_size": IMAGES}})
    spec: Any = TypeAdapter(TaskSpec).validate_python(tree)
    assert isinstance(spec, SetTask)
    return spec


CASES = [
    Case("soft_classification", "mse", "class_scene"), Case("soft_classification", "cross_entropy", "class_scene"),
    Case("semantic", "cross_entropy", "human_parts"), Case("regression", "l1", "principal_curvature"),
    Case("regression", "mse", "principal_curvature"), Case("unit_vectors", "cosine", "normal"),
    Case("unit_vectors", "l1", "normal"), Case("binary", "balanced", "sal"), Case("binary", "balanced", "edge"),
    Case("segments", "pairs", "segment_unsup2d"),
]  # fmt: skip


def prediction_of(case: Case) -> Tensor:
    """What a head might give: `[3, C]`, or `[3, C, 4, 6]`, of `segments` `[3, 64, 2, 3]`, float32."""
    g, channels = torch.Generator().manual_seed(3), case.spec().num_classes
    if case.kind == "soft_classification":
        return torch.randn(IMAGES, channels, generator=g)
    if case.kind == "segments":
        return torch.randn(IMAGES, channels, 2, 3, generator=g) / 8
    return torch.randn(IMAGES, channels, *SIZE, generator=g)


def targets_of(
    case: Case, size: tuple[int, int] = SIZE, nothing: bool = False, images: int = IMAGES
) -> dict[str, Tensor]:
    """`SubBatch.targets` of images that are valid in part, of vectors all but the first; or nothing valid."""
    g, channels = torch.Generator().manual_seed(4), case.spec().num_classes
    if case.kind == "soft_classification":
        valid = (torch.arange(images) > 0) & (not nothing)
        return {"probabilities": torch.rand(images, channels, generator=g).softmax(dim=1), "valid": valid}
    hidden = (torch.rand(images, *size, generator=g) < 0.3) | nothing
    if case.kind in ("semantic", "segments"):
        labels = torch.randint(channels if case.kind == "semantic" else 2, (images, *size), generator=g)
        return {"labels": torch.where(hidden, 255 if case.kind == "semantic" else -1, labels)}
    if case.kind == "binary":
        return {"values": (torch.rand(images, *size, generator=g) < 0.4).float(), "valid": ~hidden}
    values = torch.randn(images, channels, *size, generator=g)
    if case.kind == "unit_vectors":
        values = torch.nn.functional.normalize(values, dim=1)
    return {"values": values, "valid": ~hidden}
