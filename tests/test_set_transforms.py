"""Labels of an image set that are resized, turned and mirrored: against loops, surfaces worked out anew, and numbers by hand."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from made_up import PIXELS, holes, raw_map, sample_of, whole
from modsquad_ds.data.set_decode import SetSample
from modsquad_ds.data.set_transforms import Geometry, labels, middle_geometry, picture
from modsquad_ds.targets import DEPTH_HOLE, PASCAL_CONTEXT, TARGETS, TASKONOMY, Scale, Target
from modsquad_ds.tasks import SetTransform

PLAIN = Target("plain", "regression", 1, "grey8", "l1", ("L1",), True, Scale((0.0,), (1.0,), to=(0.0, 1.0)))


# ---------------------------------------------------------------- averages against loops


def triangle_weights(source: int, wanted: int) -> list[list[float]]:
    """Weight of each source pixel in each of the wanted ones: a triangle as wide as a wanted pixel, or as a source one."""
    scale = source / wanted
    reach = max(scale, 1.0)
    rows = []
    for place in range(wanted):
        middle = (place + 0.5) * scale
        row = [max(0.0, 1 - abs(pixel + 0.5 - middle) / reach) for pixel in range(source)]
        rows.append([weight / sum(row) for weight in row])
    return rows


def resized_by_loop(values: Tensor, valid: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Averages over valid pixels and the share of valid weight, pixel by pixel."""
    down, across = triangle_weights(values.shape[0], size[0]), triangle_weights(values.shape[1], size[1])
    mean, share = torch.zeros(size), torch.zeros(size)
    for i in range(size[0]):
        for j in range(size[1]):
            total = weight = 0.0
            for y, in_row in enumerate(down[i]):
                for x, in_column in enumerate(across[j]):
                    if in_row * in_column and valid[y, x]:
                        weight += in_row * in_column
                        total += in_row * in_column * float(values[y, x])
            mean[i, j], share[i, j] = total / weight if weight else 0.0, weight
    return mean, share


@pytest.mark.parametrize("size", [(8, 8), (7, 5), (21, 19), (12, 12)])
def test_depth_with_holes_is_resized_as_a_loop_does(size: tuple[int, int]) -> None:
    row = TARGETS["depth_zbuffer"]
    sample = sample_of([row], (12, 12), holes((12, 12)))
    sample.targets[row.name][0, 9, 9] = DEPTH_HOLE  # a hole that the mask does not know of
    found = labels(sample, [row], Geometry(1.0, size, None, False, (0, 0, *size)))[row.name]
    valid = sample.valid & (sample.targets[row.name][0] != DEPTH_HOLE)
    mean, share = resized_by_loop(sample.targets[row.name][0].double().log1p() / math.log(65536), valid, size)
    sure = (share - 0.5).abs() > 1e-3
    assert torch.equal(found["valid"][sure], (share > 0.5)[sure])
    kept = found["valid"] & sure
    assert kept.any() and not kept.all()
    torch.testing.assert_close(found["values"][0][kept], mean[kept], atol=1e-5, rtol=0)
    assert not found["values"][0][~found["valid"]].any()


def test_half_of_a_pixel_is_enough_to_be_valid() -> None:
    values = torch.tensor([[[10, 99, 30, 30]]], dtype=torch.uint8).expand(1, 4, 4)
    valid = torch.tensor([[True, False, True, True]]).expand(4, 4)
    # To half the size: pixel 0 weighs 3/7 of itself, 3/7 of 99 and 1/7 of 30; 4/7 are valid: (3 * 10 + 30) / 4.
    sample = SetSample(torch.zeros(3, 4, 4, dtype=torch.uint8), {"plain": values}, valid)
    found = labels(sample, [PLAIN], Geometry(1.0, (2, 2), None, False, (0, 0, 2, 2)))["plain"]
    assert found["valid"].all()
    torch.testing.assert_close(found["values"][0, 0], torch.tensor([15.0, 30.0]))


def test_blur_is_a_gaussian_over_valid_pixels() -> None:
    row = TARGETS["edge_occlusion"]
    assert row.scale is not None and row.scale.blur * 512 == 8  # 4 pixels of 256
    size = (20, 23)
    row = replace(row, scale=replace(row.scale, blur=4 / 20))
    sample = sample_of([row], size, holes(size))
    assert sample.valid is not None
    found = labels(sample, [row], whole(size))[row.name]
    raw = sample.targets[row.name][0].double()
    for i, j in ((0, 0), (10, 20), (19, 3), (5, 11)):
        total = weight = 0.0
        for y in range(max(i - 16, 0), min(i + 17, 20)):
            for x in range(max(j - 16, 0), min(j + 17, 23)):
                if sample.valid[y, x]:
                    share = math.exp(-((y - i) ** 2 + (x - j) ** 2) / 32)
                    weight, total = weight + share, total + share * float(raw[y, x])
        expected = -1 + 2 * (total / weight) / (0.00625 * 65535) if sample.valid[i, j] else 0.0
        assert found["values"][0, i, j].item() == pytest.approx(expected, rel=1e-4)
        assert found["valid"][i, j] == sample.valid[i, j]


def test_scales_by_hand() -> None:
    def scaled(name: str, *raw: int) -> list[float]:
        row = TARGETS[name]
        dtype = torch.int32 if row.stored == "grey16" else torch.uint8
        values = torch.tensor(raw, dtype=dtype)[:, None, None].expand(-1, 2, 2)
        sample = SetSample(torch.zeros(3, 2, 2, dtype=torch.uint8), {name: values}, None)
        found = labels(sample, [row], whole((2, 2)))[name]
        assert found["valid"].all()
        return found["values"][:, 0, 0].tolist()

    assert scaled("keypoints3d", 65535) == pytest.approx([1.0])
    assert scaled("keypoints3d", 0) == pytest.approx([-1.0])
    assert scaled("edge_texture", 5243) == scaled("edge_texture", 60000) == pytest.approx([1.0])  # clipped at 5242.8
    assert scaled("depth_zbuffer", 255) == pytest.approx([0.5], abs=1e-6)  # log 256 / log 65536
    # Mean and standard deviation of the curvatures become 0 and 1, as (0, 1) of (-1, 1) is half of the way.
    assert scaled("principal_curvature", 155, 120) == pytest.approx([(155 - 123.572) / 31.922, -0.1 / 21.658], rel=1e-4)
    assert scaled("reshading", 0, 51, 255) == pytest.approx([-1.0, -0.6, 1.0], abs=1e-6)


def test_depth_by_zoom_divides_the_raw_depth() -> None:
    row = TARGETS["depth_zbuffer"]
    values = torch.full((1, 4, 4), 1024, dtype=torch.int32)
    sample = SetSample(torch.zeros(3, 4, 4, dtype=torch.uint8), {row.name: values}, None)
    near = labels(sample, [row], Geometry(2.0, (8, 8), None, False, (0, 0, 8, 8)), depth_by_zoom=True)[row.name]
    assert near["values"].flatten().tolist() == pytest.approx([math.log(513) / math.log(65536)] * 64, abs=1e-6)
    same = labels(sample, [row], Geometry(2.0, (8, 8), None, False, (0, 0, 8, 8)))[row.name]
    assert same["values"][0, 0, 0].item() == pytest.approx(math.log(1025) / math.log(65536), abs=1e-6)


# ---------------------------------------------------------------- what does not count changes nothing


@pytest.mark.parametrize("angle", [None, 17.0])
def test_no_invalid_pixel_ever_changes_a_valid_value(angle: float | None) -> None:
    rows, size = TASKONOMY, (24, 32)
    valid = holes(size)
    sample = sample_of(rows, size, valid)
    spoiled = SetSample(sample.image, {name: values.clone() for name, values in sample.targets.items()}, valid)
    for row in rows:
        if row.masked:
            spoiled.targets[row.name][:, ~valid] = raw_map(row, size)[:, ~valid]
            if row.metres:
                spoiled.targets[row.name][:, ~valid] = DEPTH_HOLE
    geometry = Geometry(0.6, (15, 19), angle, True, (-2, 1, 16, 16))
    found, again = (labels(one, rows, geometry) for one in (sample, spoiled))
    assert list(found) == [row.name for row in rows]
    for name, entries in found.items():
        for entry, values in entries.items():
            assert torch.equal(values, again[name][entry]), (name, entry)
    assert 0 < int(found["normal"]["valid"].sum()) < 256


def test_beyond_the_picture_nothing_is_valid() -> None:
    rows = (*TASKONOMY, *PASCAL_CONTEXT)
    for angle in (None, 30.0):
        found = labels(sample_of(rows, (10, 12)), rows, Geometry(1.0, (10, 12), angle, False, (-3, -2, 16, 16)))
        inside = torch.zeros(16, 16, dtype=torch.bool)
        inside[3:13, 2:14] = True
        if angle is not None:
            inside = found["edge_texture"]["valid"]
            assert 60 < int(inside.sum()) <= 120
        assert torch.equal(found["edge_texture"]["valid"], inside)
        assert torch.equal(found["sal"]["valid"], inside) or angle is not None
        assert (found["semseg"]["labels"][~inside] == 255).all() and (found["semseg"]["labels"][inside] < 21).all()
        assert (found["segment_unsup2d"]["labels"][~inside] == -1).all()
        for entries in found.values():
            if "values" in entries:
                assert not entries["values"][..., ~entries["valid"]].any()


def test_the_edge_of_a_turned_map_is_not_mixed_with_what_lies_beyond() -> None:
    row = TARGETS["edge_texture"]
    values = torch.full((1, 12, 12), 4000, dtype=torch.int32)
    sample = SetSample(torch.zeros(3, 12, 12, dtype=torch.uint8), {row.name: values}, None)
    found = labels(sample, [row], whole((12, 12), angle=30.0))[row.name]
    assert 80 < int(found["valid"].sum()) < 144
    torch.testing.assert_close(found["values"][0][found["valid"]].unique().mean(), torch.tensor(-1 + 2 * 4000 / (0.08 * 65535)))
    assert found["values"][0][found["valid"]].std() < 1e-5


def test_long_and_short_vectors_weigh_alike() -> None:
    row = TARGETS["normal"]
    values = torch.full((3, 2, 2), 127.5).round()
    values[0, 0] = 191  # 0.5 to the right, above 1.0 downwards
    values[1, 1] = 255
    sample = SetSample(torch.zeros(3, 2, 2, dtype=torch.uint8), {"normal": values.to(torch.uint8)}, None)
    x, y, _ = labels(sample, [row], Geometry(0.5, (1, 1), None, False, (0, 0, 1, 1)))["normal"]["values"].flatten().tolist()
    assert x == pytest.approx(y, abs=0.01) and x == pytest.approx(math.sqrt(0.5), abs=0.01)


def test_masked_labels_and_vectors_of_no_length_are_not_valid() -> None:
    valid = torch.ones(4, 4, dtype=torch.bool)
    valid[0] = False
    rows = [TARGETS[name] for name in ("normal", "segment_unsup2d", "segment_unsup25d")]
    sample = sample_of(rows, (4, 4), valid)
    sample.targets["normal"][:, 1] = 128  # the middle: no direction
    sample.targets["normal"][:, 2] = torch.tensor([255, 128, 128], dtype=torch.uint8)[:, None]
    sample.targets["normal"][:, 3] = torch.tensor([200, 250, 128], dtype=torch.uint8)[:, None]
    found = labels(sample, rows, whole((4, 4)))
    assert found["normal"]["valid"].all(1).tolist() == [False, False, True, True]
    x, y, _ = found["normal"]["values"][:, 3, 0].tolist()
    assert x / y == pytest.approx((200 / 127.5 - 1) / (250 / 127.5 - 1), rel=1e-5)
    torch.testing.assert_close(found["normal"]["values"][:, 2:].norm(dim=0), torch.ones(2, 4))
    assert (found["segment_unsup25d"]["labels"][0] == -1).all() and (found["segment_unsup2d"]["labels"] >= 0).all()
    assert torch.equal(found["segment_unsup2d"]["labels"], sample.targets["segment_unsup2d"][0].long())


# ---------------------------------------------------------------- directions, from surfaces whose normals are known


def normals_of(depth: Callable[[Tensor, Tensor], Tensor], size: int) -> Tensor:
    """Towards the eye, `[3, size, size]`, of the surface z = depth(x, y), x to the right and y down from the middle."""
    at = torch.arange(size, dtype=torch.float64) + 0.5 - size / 2
    y, x = torch.meshgrid(at, at, indexing="ij")
    step = 1e-4
    slope_x = (depth(x + step, y) - depth(x - step, y)) / (2 * step)
    slope_y = (depth(x, y + step) - depth(x, y - step)) / (2 * step)
    normal = torch.stack([slope_x, slope_y, -torch.ones_like(x)])
    return normal / normal.norm(dim=0)


def bowl(x: Tensor, y: Tensor) -> Tensor:
    """Part of a sphere off the middle, on a slant: no symmetry of its own."""
    return 60 - (3600 - (x - 5) ** 2 - (y + 9) ** 2).sqrt() + 0.3 * x - 0.1 * y


def rotated(depth: Callable[[Tensor, Tensor], Tensor], angle: float) -> Callable[[Tensor, Tensor], Tensor]:
    """The surface turned anticlockwise as one looks at it: what was to the right of the middle comes to lie above it."""
    cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    return lambda x, y: depth(x * cos - y * sin, x * sin + y * cos)


def mirrored(depth: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, y: depth(-x, y)


@pytest.mark.parametrize(
    ("angle", "flip"), [(None, True), (90.0, False), (20.0, False), (-35.0, False), (20.0, True), (180.0, True)]
)
def test_normals_turn_with_the_surface(angle: float | None, flip: bool) -> None:
    size = 48
    row = TARGETS["normal"]
    raw = ((normals_of(bowl, size) + 1) * 127.5).round().to(torch.uint8)
    sample = SetSample(torch.zeros(3, size, size, dtype=torch.uint8), {"normal": raw}, None)
    found = labels(sample, [row], whole((size, size), flip, angle))["normal"]
    surface = bowl if angle is None else rotated(bowl, angle)
    expected = normals_of(mirrored(surface) if flip else surface, size)
    off = (found["values"].double() * expected).sum(0).clamp(-1, 1).acos().rad2deg()
    middle = torch.zeros(size, size, dtype=torch.bool)
    middle[8:-8, 8:-8] = True
    assert found["valid"][middle].all()
    assert off[found["valid"]].max() < 1.0, "degrees; bytes are good for half of one"
    still = (normals_of(bowl, size) * expected).sum(0).clamp(-1, 1).acos().rad2deg()
    assert still.mean() > 3, "the test would not notice if nothing turned"


def test_anticlockwise_moves_the_right_edge_to_the_top() -> None:
    row = TARGETS["segment_unsup2d"]
    ids = torch.zeros(1, 6, 6, dtype=torch.uint8)
    ids[0, 2, 5] = 9
    image = torch.zeros(3, 6, 6, dtype=torch.uint8)
    image[:, 2, 5] = 200
    sample = SetSample(image, {row.name: ids}, None)
    geometry = whole((6, 6), angle=90.0)
    assert (labels(sample, [row], geometry)[row.name]["labels"] == 9).nonzero().tolist() == [[0, 2]]
    shown, _ = picture(image, geometry, False, PIXELS)
    assert (shown[0] == 200).nonzero().tolist() == [[0, 2]]


def test_binary_is_over_half_of_255() -> None:
    row = TARGETS["sal"]
    values = torch.tensor([[[0, 127], [128, 255]]], dtype=torch.uint8)
    sample = SetSample(torch.zeros(3, 2, 2, dtype=torch.uint8), {"sal": values}, None)
    assert labels(sample, [row], whole((2, 2)))["sal"]["values"].tolist() == [[0, 0], [1, 1]]
    assert middle_geometry((2, 2), SetTransform(crop=(4, 4))).window == (-1, -1, 4, 4)


def test_ids_are_those_of_the_nearest_pixel() -> None:
    row = TARGETS["segment_unsup2d"]
    ids = torch.arange(16, dtype=torch.uint8).view(1, 4, 4)
    sample = SetSample(torch.zeros(3, 4, 4, dtype=torch.uint8), {row.name: ids}, None)
    halved = labels(sample, [row], Geometry(0.5, (2, 2), None, True, (0, 0, 2, 2)))[row.name]["labels"]
    assert halved.tolist() == [[7, 5], [15, 13]] and halved.dtype == torch.int64
