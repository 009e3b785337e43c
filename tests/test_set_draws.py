"""A sample of an image set in training and evaluation: one draw for the picture and all its labels, and what a metric needs."""

from typing import Any

import pytest
import torch

from made_up import PIXELS, holes, sample_of, whole
from modsquad_ds.data import set_transforms
from modsquad_ds.data.set_decode import SetSample
from modsquad_ds.data.set_transforms import Geometry, labels, picture, random_geometry, set_eval, set_train
from modsquad_ds.data.transforms import seeded
from modsquad_ds.targets import PASCAL_CONTEXT, TASKONOMY, Scale, Target
from modsquad_ds.tasks import SetTransform

SPECS: list[dict[str, Any]] = [
    {"crop": (16, 16)},
    {"crop": (16, 24), "resize": (20, 20), "zoom": (0.5, 1.5)},
    {"crop": (32, 32), "zoom": (0.75, 1.25), "rotate": 20.0},
]


@pytest.mark.parametrize("changes", SPECS)
def test_labels_lie_where_the_picture_does(changes: dict[str, Any]) -> None:
    """A picture that is smooth and its own label: both arrive alike, whatever the draw."""
    spec = SetTransform(**changes)
    ramp = (torch.arange(28)[:, None] * 5 + torch.arange(36) * 3).clamp(max=255).to(torch.uint8)
    row = Target("copy", "regression", 3, "rgb8", "l1", ("L1",), scale=Scale((0.0,), (255.0,), to=(0.0, 255.0)))
    ids = Target("ids", "segments", 2, "grey8", "pairs", ("pair_acc",))
    sample = SetSample(ramp.expand(3, -1, -1).contiguous(), {"copy": ramp.expand(3, -1, -1), "ids": ramp[None]}, None)
    flips = set()
    for seed in range(12):
        with seeded(seed):
            ready = set_train(sample, (row, ids), spec, PIXELS)
        with seeded(seed):
            flips.add(random_geometry((28, 36), spec).flip)
        assert ready.image.shape == (3, *spec.crop)
        copy, valid = ready.target["copy"]["values"], ready.target["copy"]["valid"]
        # Corners that turning uncovers are blended with the mean colour.
        sure = valid & (torch.nn.functional.avg_pool2d(valid[None].float(), 3, 1, 1)[0] > 0.99) if spec.rotate else valid
        assert sure.any()
        assert (ready.image.float() - copy).abs()[:, sure].max() <= 2, "resizing bytes rounds, and turning rounds again"
        near = ready.target["ids"]["labels"]
        assert (near.float() - copy[0]).abs()[sure & (near >= 0)].max() <= 5
        if ready.area is None:
            assert spec.rotate
        else:
            top, left, bottom, right = ready.area
            assert valid[top:bottom, left:right].all() and int(valid.sum()) == (bottom - top) * (right - left)
    assert flips == {True, False}


def test_the_draw_does_not_depend_on_what_is_wanted() -> None:
    rows = (*TASKONOMY, *PASCAL_CONTEXT)
    spec = SetTransform(crop=(16, 16), zoom=(0.5, 1.5), rotate=10.0, photometric=True)
    sample = sample_of(rows, valid=holes((24, 32)))
    for seed in range(4):
        with seeded(seed):
            everything = set_train(sample, rows, spec, PIXELS)
        for row in rows[::3]:
            with seeded(seed):
                alone = set_train(sample, (row,), spec, PIXELS)
            assert torch.equal(alone.image, everything.image)
            assert list(alone.target) == [row.name]
            for name, entry in alone.target[row.name].items():
                assert torch.equal(entry, everything.target[row.name][name])


def test_photometric_distortion_leaves_labels_alone() -> None:
    rows = TASKONOMY
    sample = sample_of(rows)
    plain, distorted = SetTransform(crop=(16, 16)), SetTransform(crop=(16, 16), photometric=True)
    changed = 0
    for seed in range(4):
        with seeded(seed):
            one = set_train(sample, rows, plain, PIXELS)
        with seeded(seed):
            other = set_train(sample, rows, distorted, PIXELS)
        changed += not torch.equal(one.image, other.image)
        for name in one.target:
            assert all(torch.equal(one.target[name][entry], other.target[name][entry]) for entry in one.target[name])
    assert changed


@pytest.mark.parametrize("changes", SPECS)
def test_photometric_distortion_moves_no_pixel(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    sample, seen = sample_of(()), []
    for seed in range(8):
        with seeded(seed):
            plain = set_train(sample, (), SetTransform(**changes), PIXELS)
        with seeded(seed), monkeypatch.context() as patch:
            patch.setattr(set_transforms, "_PHOTOMETRIC", lambda image: seen.append(image) or image)
            through = set_train(sample, (), SetTransform(**changes, photometric=True), PIXELS)
        assert torch.equal(plain.image, through.image) and plain.area == through.area
    assert len(seen) == 8


def test_every_window_occurs_and_none_reaches_beyond_a_larger_picture() -> None:
    spec = SetTransform(crop=(4, 4))
    with seeded(0):
        larger = {random_geometry((6, 4), spec).window for _ in range(60)}
        smaller = {random_geometry((3, 4), spec).window for _ in range(60)}
    assert larger == {(top, 0, 4, 4) for top in range(3)}
    assert smaller == {(-top, 0, 4, 4) for top in range(2)}


@pytest.mark.parametrize("changes", SPECS)
def test_every_pixel_of_the_batch_is_written(changes: dict[str, Any]) -> None:
    spec, sample = SetTransform(**changes), sample_of(TASKONOMY)
    for seed in range(4):
        images = []
        for value in (0, 255):
            out = torch.full((3, *spec.crop), value, dtype=torch.uint8)
            with seeded(seed):
                ready = set_train(sample, TASKONOMY, spec, PIXELS, out)
            assert ready.image is out
            images.append(out)
        with seeded(seed):
            images.append(set_train(sample, TASKONOMY, spec, PIXELS).image)
        assert torch.equal(images[0], images[1]) and torch.equal(images[0], images[2])


def test_turned_corners_have_the_mean_colour() -> None:
    shown, area = picture(torch.full((3, 16, 16), 255, dtype=torch.uint8), whole((16, 16), angle=45.0), False, PIXELS)
    assert shown[:, 0, 0].tolist() == [120, 110, 100] and shown[:, 8, 8].tolist() == [255] * 3
    assert area == (0, 0, 16, 16)


# ---------------------------------------------------------------- evaluation


def test_scored_at_the_input_the_label_lies_on_the_canvas() -> None:
    rows = PASCAL_CONTEXT
    spec = SetTransform(crop=(16, 16), resize=(20, 20), zoom=(0.5, 2.0), rotate=20.0, photometric=True)
    sample = sample_of(rows)
    ready = set_eval(sample, rows, spec, PIXELS)
    assert ready.meta["size"] == (24, 32) and ready.meta["canvas"] == (16, 16) and ready.meta["window"] is None
    expected = labels(sample, rows, Geometry(1.0, (20, 20), None, False, (2, 2, 16, 16)))
    for name, entries in expected.items():
        for entry, values in entries.items():
            assert torch.equal(ready.meta["label"][name][entry], values) and torch.equal(ready.target[name][entry], values)
    assert ready.area == (0, 0, 16, 16) and ready.meta["valid"] is True


@pytest.mark.parametrize(("size", "window"), [((11, 13), (3, 2, 11, 13)), ((16, 16), (0, 0, 16, 16)), ((1, 16), (8, 0, 1, 16))])
def test_window_is_where_the_whole_image_lies(size: tuple[int, int], window: tuple[int, ...]) -> None:
    rows = PASCAL_CONTEXT
    spec = SetTransform(crop=(16, 16), score_at="original")
    sample = sample_of(rows, size)
    ready = set_eval(sample, rows, spec, PIXELS)
    top, left, height, width = ready.meta["window"]
    # In the middle; of an odd rest, the larger part comes first.
    assert (height, width) == size and ready.area == (top, left, top + height, left + width)
    assert (top, left, height, width) == window
    assert torch.equal(ready.image[:, top : top + height, left : left + width], sample.image)
    stored = sample.targets["semseg"][0].long()
    assert torch.equal(ready.meta["label"]["semseg"]["labels"], stored)
    assert torch.equal(ready.target["semseg"]["labels"][top : top + height, left : left + width], stored)


def test_original_scale_keeps_stored_labels_of_a_resized_image() -> None:
    rows = PASCAL_CONTEXT
    ready = set_eval(sample_of(rows), rows, SetTransform(crop=(16, 32), resize=(16, 16), score_at="original"), PIXELS)
    assert ready.meta["window"] == (0, 8, 16, 16)
    assert ready.meta["label"]["normals"]["values"].shape == (3, 24, 32)
    assert ready.target["normals"]["values"].shape == (3, 16, 32)
    with pytest.raises(ValueError, match=r"24x32 is larger than transform\.crop 16x16"):
        set_eval(sample_of(rows), rows, SetTransform(crop=(16, 16), score_at="original"), PIXELS)
