"""Taskonomy's targets made of photographs: each against its definition on surfaces that are known, and the dataset's layout."""

import csv
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from modsquad_ds.data import photo_labels, photo_scenes
from modsquad_ds.data.photo_labels import Camera, Depth, Real
from modsquad_ds.data.photo_scenes import GAP, SIDE, Part, build, labels_of, load_scene, part_of, scaled
from modsquad_ds.errors import UserError
from modsquad_ds.targets import TARGETS

CAMERA = Camera(focal=100.0, cx=31.5, cy=23.5)
INSIDE = np.s_[12:-12, 12:-12]
"""Where smoothing does not reach the edge."""


@cache
def motorcycle() -> Part:
    return load_scene("motorcycle")


def surface(depth: Callable[[Real, Real], Real], focal: float = 100.0) -> Depth:
    """Depth where each pixel's ray `(x, y, 1)` meets a surface, given as a function of the ray."""
    camera = CAMERA._replace(focal=focal)
    rays = camera.rays(48, 64)
    metres = depth(rays[..., 0], rays[..., 1])
    return Depth(metres, np.ones_like(metres, dtype=bool), camera)


def depth_of(part: Part) -> Depth:
    assert part.depth is not None
    return part.depth


def sphere(x: Real, y: Real, near: bool) -> Real:
    """Depth of the near or far side of a sphere of radius 1 around (0, 0, 2)."""
    square = x * x + y * y + 1
    root = np.sqrt(4 - 3 * square)
    return (2 - root if near else 2 + root) / square


# ---------------------------------------------------------------- depth


def test_depth_of_the_stereo_pair_is_what_its_calibration_says() -> None:
    metres, valid, _ = depth_of(motorcycle())
    assert motorcycle().rgb.shape == (500, 741, 3)
    assert 1 - valid.mean() == pytest.approx(0.0735, abs=5e-5)
    assert (metres[valid].min(), metres[valid].max()) == pytest.approx((2.110, 5.017), abs=5e-4)
    raw = photo_labels.raw_depth(metres, valid)
    assert (raw[valid].min(), raw[valid].max()) == (1081, 2569) and (raw[~valid] == 65535).all()
    # One pixel by hand: f 994.978 px, baseline 193.001 mm, disparity 40 px plus 31.086 px of offset.
    one = photo_labels.depth_from_disparity(np.array([[40.0, np.inf]], np.float32), photo_scenes.MOTORCYCLE)
    assert one.metres[0, 0] == pytest.approx(994.978 * 0.193001 / 71.086) and one.valid.tolist() == [[True, False]]


def test_camera_of_a_cut_and_resized_image_sees_the_same_rays() -> None:
    whole = CAMERA.rays(48, 64)
    assert np.allclose(CAMERA.cut(10).rays(48, 54), whole[:, 10:])
    # At half the size a pixel's centre lies between the centres of four.
    four = (whole[::2, ::2] + whole[1::2, ::2] + whole[::2, 1::2] + whole[1::2, 1::2]) / 4
    assert np.allclose(CAMERA.scaled(0.5).rays(24, 32), four)


def test_distance_from_the_camera_is_depth_along_the_ray() -> None:
    part = scaled(part_of(motorcycle(), "val"), 0.4)
    labels, valid = labels_of(part), depth_of(part).valid
    expected = labels["depth_zbuffer"] * np.linalg.norm(depth_of(part).rays, axis=-1)
    assert np.abs(labels["depth_euclidean"] - expected)[valid].max() < 1.1, "steps of 1/512 m"
    assert (labels["depth_euclidean"][~valid] == 65535).all()
    assert set(np.unique(depth_of(part).metres)) <= {*np.unique(depth_of(motorcycle()).metres)}, "no depth that was not measured"


# ---------------------------------------------------------------- normals, shading, curvature


def test_normal_of_a_tilted_plane() -> None:
    # The plane n . p = -2 with n = (0.6, 0, -0.8) meets the ray (x, y, 1) at depth 2 / (0.8 - 0.6 x).
    plane = surface(lambda x, y: 2 / (0.8 - 0.6 * x))
    normal = photo_labels.normals(plane)
    assert np.allclose(normal[INSIDE], (0.6, 0.0, -0.8), atol=2e-3)
    image = photo_labels.normal_image(normal, plane.valid)
    assert np.abs(image[INSIDE].astype(int) - (204, 128, 230)).max() <= 1, "to the right and towards the viewer"
    # The light's direction is the ray's, so shading falls where the plane is seen from the side.
    expected = (0.8 - 0.6 * plane.rays[..., 0]) / np.linalg.norm(plane.rays, axis=-1)
    assert np.allclose(photo_labels.shading(plane)[INSIDE], expected[INSIDE], atol=3e-3)


def test_normals_of_the_photograph_face_the_camera_and_are_flipped_with_it() -> None:
    depth = depth_of(scaled(part_of(motorcycle(), "train"), 0.4))
    normal = photo_labels.normals(depth)
    assert np.allclose(np.linalg.norm(normal, axis=-1), 1)
    assert (np.sum(normal * depth.rays, axis=-1)[depth.valid] < 0).all()
    mirror = depth.camera._replace(cx=depth.valid.shape[1] - 1 - depth.camera.cx)
    flipped = photo_labels.normals(Depth(depth.metres[:, ::-1], depth.valid[:, ::-1], mirror))
    # In holes, which of two equally near pixels stands in may differ.
    assert np.allclose(flipped[:, ::-1][depth.valid], normal[depth.valid] * (-1, 1, 1), atol=1e-3)


def test_curvature_of_a_ball_and_of_a_bowl() -> None:
    # Smoothing by 4 pixels flattens a ball of radius 1 m, seen at 250 pixels per unit, by a few per cent.
    for near, sign in ((True, 1.0), (False, -1.0)):
        found = photo_labels.curvatures(surface(lambda x, y, near=near: sphere(x, y, near), focal=250.0))
        assert np.allclose(found[INSIDE], sign, atol=0.08)
    image = photo_labels.curvature_image(np.array([[[1 / 0.03, 0.0], [99.0, -99.0]]]), np.array([[True, True]]))
    assert image.tolist() == [[[254, 127, 0], [254, 0, 0]]]


def test_curvature_of_a_cylinder_has_one_direction() -> None:
    # Radius 1 around the line x = 0, z = 2.
    cylinder = surface(lambda x, y: (2 - np.sqrt(4 - 3 * (x * x + 1))) / (x * x + 1), focal=250.0)
    found = photo_labels.curvatures(cylinder)[INSIDE]
    assert np.allclose(found[..., 0], 1.0, atol=0.08) and np.allclose(found[..., 1], 0.0, atol=0.02)


def test_holes_have_the_values_of_no_label() -> None:
    part = scaled(part_of(motorcycle(), "train"), 0.4)
    labels, hole = labels_of(part), ~depth_of(part).valid
    assert (labels["normal"][hole] == 128).all() and (labels["principal_curvature"][hole] == 0).all()
    assert (labels["reshading"][hole] == 0).all() and (labels["edge_occlusion"][hole] == 0).all()
    assert (labels["reshading"][..., 0] == labels["reshading"][..., 2]).all()


# ---------------------------------------------------------------- edges, keypoints, segments


def test_occlusion_edge_is_where_depth_jumps() -> None:
    raw = np.full((20, 20), 1024, np.uint16)
    raw[:, 10:] = 2304
    edges = photo_labels.occlusion_edges(raw)
    # The jump of sqrt(depth / 65536), 0.125 to 0.1875, over the root of the two directions that Sobel's magnitude is a mean of.
    assert edges[10, 9] == edges[10, 10] == pytest.approx(0.0625 / np.sqrt(2) * 65535, abs=1)
    assert (edges[:, :9] == 0).all() and (edges[:, 11:] == 0).all()
    raw[:, 10:] = 65535
    assert (photo_labels.occlusion_edges(raw) == 0).all(), "a hole is no edge"


def test_texture_edges_and_keypoints_of_a_square() -> None:
    rgb = np.zeros((64, 64, 3), np.uint8)
    rgb[24:40, 24:40] = 255
    edges, points = photo_labels.texture_edges(rgb), photo_labels.keypoints2d(rgb)
    assert edges[32, 24] > 10 * edges[32, 32] and edges[32, 24] == pytest.approx(edges[24, 32], abs=1)
    assert np.allclose(np.unravel_index(points.argmax(), points.shape), 31.5, atol=3), "a blob is a keypoint"
    assert points.max() > 328, "the row's cap of 0.005 is reached"
    assert (photo_labels.texture_edges(np.full((64, 64, 3), 90, np.uint8))[5:-5, 5:-5] == 0).all()


def test_segments_of_two_colours_and_of_two_depths() -> None:
    rgb = np.full((48, 64, 3), (200, 40, 40), np.uint8)
    rgb[:, 32:] = (30, 60, 220)
    ids = photo_labels.segments2d(rgb)
    assert len(np.unique(ids[:, :26])) == len(np.unique(ids[:, 38:])) == 1 and ids[0, 0] != ids[0, -1]
    metres = np.broadcast_to(np.repeat([2.0, 4.0, 3.0, 5.0], 40), (60, 160))
    ids = photo_labels.segments25d(Depth(metres, np.ones_like(metres, dtype=bool), CAMERA))
    assert sorted(len(np.unique(ids[:, start + 12 : start + 28])) for start in range(0, 160, 40)) == [1, 1, 1, 1]
    assert len(np.unique(ids[30, 20::40])) == 4


# ---------------------------------------------------------------- the dataset

VIEWS = {"train": {"motorcycle": 2, "chelsea": 2}, "val": {"motorcycle": 1, "chelsea": 1}}
FILE = re.compile(r"point_(\d+)_view_(\d+)_domain_(\w+)\.png")
DEPTH_FREE = {"rgb", "edge_texture", "keypoints2d", "segment_unsup2d"}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photo") / "scenes"
    build(folder, VIEWS, scales=(0.4, 0.6))
    return folder / "sources"


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_layout_is_taskonomys(built: Path) -> None:
    split = (built / "split.csv").read_bytes()
    assert b"\n" not in split and split.startswith(b"id,train,val,test\r")
    rows = {row["id"]: row for row in csv.DictReader(split.decode().split("\r"))}
    assert set(rows) == {f"{scene}{side}" for scene in ("motorcycle", "chelsea") for side in ("left", "right")}
    assert rows["chelsealeft"] == {"id": "chelsealeft", "train": "1", "val": "0", "test": "0"}
    found: dict[str, set[str]] = {}
    for name, content in files_of(built).items():
        if name.endswith(".png"):
            task, component, building, file = name.split("/")
            match = FILE.fullmatch(file)
            assert component == "taskonomy" and building in rows and match and match[3] == task
            found.setdefault(f"{building} {match[1]} {match[2]}", set()).add(task)
            bits = 16 if task != "rgb" and TARGETS[task].stored == "grey16" else 8
            assert content[24] == bits, "bit depth in the file's head"
    # chelsea's right part is 72 pixels wide at 0.4, so that scale is left out.
    assert len(found) == 2 * 2 + 2 * 1 + 2 + 1
    for view, tasks in found.items():
        depth = set(TARGETS) & {*tasks} - DEPTH_FREE
        assert tasks >= DEPTH_FREE and len(depth) == (8 if view.startswith("motorcycle") else 0)


def test_same_bytes_every_time_and_a_finished_build_is_kept(built: Path, tmp_path: Path) -> None:
    build(tmp_path / "b", VIEWS, scales=(0.4,))
    first, again = files_of(built), files_of(tmp_path / "b" / "sources")
    views = [name for name in again if "_view_0_" in name]
    assert len(views) == 12 * 3 and all(first[name] == again[name] for name in views)
    assert views == [name for name in first if "_view_0_" in name]
    (tmp_path / "b" / "sources" / "split.csv").write_text("changed")
    build(tmp_path / "b", VIEWS, scales=(0.4,))
    assert (tmp_path / "b" / "sources" / "split.csv").read_text() == "changed"


def test_views_are_pieces_of_the_part_and_its_labels(built: Path) -> None:
    part = scaled(part_of(motorcycle(), "val"), 0.4)
    labels = {"rgb": part.rgb, **labels_of(part)}
    view = {task: np.asarray(Image.open(next((built / task).rglob("motorcycleright/point_0_view_0_*")))) for task in labels}
    windows = np.lib.stride_tricks.sliding_window_view(labels["depth_zbuffer"], (SIDE, SIDE))
    (top,), (left,) = np.nonzero((windows == view["depth_zbuffer"]).all(axis=(2, 3)))
    for task, image in view.items():
        assert np.array_equal(image, labels[task][top : top + SIDE, left : left + SIDE]), task


def test_held_out_columns_never_train() -> None:
    columns = np.arange(741)
    scene = Part(np.broadcast_to(columns[None, :, None], (10, 741, 3)))
    train, val = (part_of(scene, split).rgb[0, :, 0] for split in ("train", "val"))
    assert (train.max(), val.min(), val.max()) == (407, 408 + GAP, 740)


def test_build_leaves_other_folders_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("dear to me")
    with pytest.raises(UserError, match="is not made of photo scenes"):
        build(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
