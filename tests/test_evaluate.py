"""Predictions of a batch: the same whoever an image's neighbours are."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from modsquad_ds.data.collate import Pixels
from modsquad_ds.data.decode import Decoded, DetectionLabel
from modsquad_ds.data.transforms import TRANSFORMS
from modsquad_ds.evaluate import predict_batch
from modsquad_ds.model.network import build_network
from modsquad_ds.tasks import DETECTION
from small import small_recipe


def label(kind: str, image: Tensor) -> Any:
    if kind == DETECTION:
        nothing: dict[str, list[Any]] = {"boxes": [], "labels": [], "iscrowd": [], "area": []}
        return DetectionLabel(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4), nothing)
    return torch.zeros(image.shape[-2:], dtype=torch.uint8)


@pytest.mark.parametrize("task", ["scenes", "textures"])
def test_an_image_is_predicted_alike_alone_and_beside_others(task: str) -> None:
    """Landscape beside upright: the batch is padded to a square that neither of them fills."""
    recipe = small_recipe(**{"tasks.scenes.transform.eval_canvas": [32, 64], "tasks.textures.transform.resize": [32, 64]})
    spec, pixels = recipe.tasks[task], Pixels(recipe.mean, recipe.std, recipe.model.shape.patch)
    network, rows = build_network(recipe).eval(), TRANSFORMS[spec.kind]
    generator = torch.Generator().manual_seed(0)
    shapes = ((30, 60), (60, 30), (40, 44))
    images = [torch.randint(256, (3, *shape), generator=generator, dtype=torch.uint8) for shape in shapes]
    ready = [rows.evaluate(Decoded(image, label(spec.kind, image)), spec.transform, pixels) for image in images]
    together = rows.collate(ready, ["a", "b", "c"], pixels)
    assert together.images_BCHW.shape[-2:] == (64, 64)
    with torch.inference_mode():
        found = predict_batch(network, task, together)
        alone = [predict_batch(network, task, rows.collate([one], ["x"], pixels))[0] for one in ready]
    assert len(found) == 3
    for a, b in zip(found, alone, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert_close(a[name], b[name])
