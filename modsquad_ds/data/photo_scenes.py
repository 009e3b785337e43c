"""A small Taskonomy: photographs that come with scikit-image, labelled by photo_labels.py, in Taskonomy's own layout.

    OUT/sources/<task>/taskonomy/<building>/point_<P>_view_<V>_domain_<task>.png    pictures of 96 x 96 pixels
    OUT/sources/split.csv                                                          which buildings train; CR line ends, as there

Scenes: Middlebury's motorcycle with its measured disparity (all eleven targets that need no trained network; depths of 2.1 to
5.0 m, 7 % holes), and four photographs without depth (the three targets that need pixels alone). The left 55 % of each scene is a
building that trains, what lies right of a gap of 24 pixels one that is held out; each part is cut out before it is labelled, so
no filter looks across the gap.

Views are crops at random places of the part at up to three scales (`view`: number of the scale; a scale at which a part is
smaller than a view is left out), so views of a building overlap: 480 train, 132 are held out. Shards are made of this as of the
real dataset, by the command `shards taskonomy`.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from modsquad_ds.data import photo_labels
from modsquad_ds.data.photo_labels import Bytes, Camera, Depth
from modsquad_ds.data.staging import staged_folder
from modsquad_ds.errors import UserError

VERSION = 1
"""Raised with every change of what is built, so that an older build is replaced."""
MARKER = "photo_scenes.json"
SIDE = 96
"""Height and width of a view in pixels."""
SCALES = (0.8, 0.6, 0.4)
TRAIN_SHARE = 0.55
"""Of a scene's width."""
GAP = 24
"""Columns of a scene, at its own size, that no building has."""
SPLITS = ("train", "val")
PHOTOS = ("astronaut", "coffee", "chelsea", "rocket")
STEREO = "motorcycle"
VIEWS = {"train": {STEREO: 80, **dict.fromkeys(PHOTOS, 24)}, "val": {STEREO: 24, **dict.fromkeys(PHOTOS, 6)}}
"""Crops of each scene at each scale."""
MOTORCYCLE = Camera(focal=994.978, cx=311.193, cy=254.877, baseline=0.193001, doffs=31.086)


class Part(NamedTuple):
    """A piece of a scene."""

    rgb: Bytes
    depth: Depth | None = None


def build(out: Path, views: Mapping[str, Mapping[str, int]] = VIEWS, scales: tuple[float, ...] = SCALES) -> None:
    """Make the dataset in `out`; does nothing where this version's build is there.

    `out` appears as a whole at the end, so shards made inside it vanish with an older build. UserError if `out` holds something
    else, or if scikit-image is missing.
    """
    wanted = {"version": VERSION, "views": {split: dict(of) for split, of in views.items()}, "scales": list(scales)}
    if _is_complete(out, wanted):
        return
    with staged_folder(out) as stage:
        folder = stage / "sources"
        rows = []
        for number, name in enumerate(dict.fromkeys(name for of in views.values() for name in of)):
            scene = load_scene(name)
            parts = {split: part_of(scene, split) for split in SPLITS}
            smallest = min(side for part in parts.values() for side in part.rgb.shape[:2])
            for split, part in parts.items():
                building = f"{name}{'left' if split == 'train' else 'right'}"
                rows.append(f"{building},{int(split == 'train')},{int(split == 'val')},0")
                for view, factor in enumerate(scales):
                    rng = np.random.default_rng([number, SPLITS.index(split), view])
                    if round(smallest * factor) >= SIDE:
                        _write_views(folder, building, scaled(part, factor), view, views[split].get(name, 0), rng)
        (folder / "split.csv").write_bytes("\r".join(["id,train,val,test", *rows, ""]).encode())
        (folder / "ATTRIBUTION.txt").write_text(ATTRIBUTION, encoding="utf-8")
        (stage / MARKER).write_text(json.dumps(wanted, indent=1), encoding="utf-8")


def _is_complete(out: Path, wanted: dict[str, Any]) -> bool:
    """Whether `out` is a finished build of this kind. UserError if it holds anything that is not photo scenes."""
    marker = out / MARKER
    if marker.is_file():
        return marker.read_text(encoding="utf-8") == json.dumps(wanted, indent=1)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is not made of photo scenes, so it is left alone: choose another folder")
    return False


# ---------------------------------------------------------------- scenes and their parts


def load_scene(name: str) -> Part:
    """A whole scene at its own size."""
    from skimage import data

    if name != STEREO:
        return Part(getattr(data, name)())
    left, _, disparity = data.stereo_motorcycle()
    return Part(left, photo_labels.depth_from_disparity(disparity, MOTORCYCLE))


def part_of(scene: Part, split: str) -> Part:
    """The columns of a scene that train, or those that are held out."""
    first = round(TRAIN_SHARE * scene.rgb.shape[1])
    start, stop = (0, first) if split == "train" else (first + GAP, scene.rgb.shape[1])
    if scene.depth is None:
        return Part(scene.rgb[:, start:stop])
    metres, valid, camera = scene.depth
    return Part(scene.rgb[:, start:stop], Depth(metres[:, start:stop], valid[:, start:stop], camera.cut(start)))


def scaled(part: Part, factor: float) -> Part:
    """A part as a camera with `factor` times the focal length sees it. Depths are sampled: a mean of two is neither."""
    height, width = (round(side * factor) for side in part.rgb.shape[:2])
    rgb = np.asarray(Image.fromarray(part.rgb).resize((width, height), Image.Resampling.BOX))
    if part.depth is None:
        return Part(rgb)
    metres, valid, camera = part.depth
    rows = ((np.arange(height) + 0.5) * part.rgb.shape[0] / height).astype(int)
    columns = ((np.arange(width) + 0.5) * part.rgb.shape[1] / width).astype(int)
    places = np.ix_(rows, columns)
    return Part(rgb, Depth(metres[places], valid[places], camera.scaled(factor)))


def labels_of(part: Part) -> dict[str, NDArray[Any]]:
    """Target -> map of the part, as Taskonomy stores it; those of depth only where there is depth."""
    labels: dict[str, NDArray[Any]] = {
        "edge_texture": photo_labels.texture_edges(part.rgb),
        "keypoints2d": photo_labels.keypoints2d(part.rgb),
        "segment_unsup2d": photo_labels.segments2d(part.rgb),
    }
    if part.depth is None:
        return labels
    depth, valid = part.depth, part.depth.valid
    raw = photo_labels.raw_depth(depth.metres, valid)
    distance = depth.metres * np.linalg.norm(depth.rays, axis=-1)
    return labels | {
        "depth_zbuffer": raw,
        "depth_euclidean": photo_labels.raw_depth(distance, valid),
        "normal": photo_labels.normal_image(photo_labels.normals(depth), valid),
        "principal_curvature": photo_labels.curvature_image(photo_labels.curvatures(depth), valid),
        "reshading": photo_labels.grey_image(photo_labels.shading(depth), valid),
        "edge_occlusion": photo_labels.occlusion_edges(raw),
        "keypoints3d": photo_labels.keypoints3d(depth),
        "segment_unsup25d": photo_labels.segments25d(depth),
    }


def _write_views(folder: Path, building: str, part: Part, view: int, count: int, rng: np.random.Generator) -> None:
    """`count` crops of the part and its labels, at random places."""
    if not count:
        return
    images = {"rgb": part.rgb, **labels_of(part)}
    height, width = part.rgb.shape[:2]
    for task in images:
        (folder / task / "taskonomy" / building).mkdir(parents=True, exist_ok=True)
    for point in range(count):
        top, left = (int(rng.integers(0, side - SIDE + 1)) for side in (height, width))
        for task, image in images.items():
            crop = np.ascontiguousarray(image[top : top + SIDE, left : left + SIDE])
            path = folder / task / "taskonomy" / building / f"point_{point}_view_{view}_domain_{task}.png"
            Image.fromarray(crop).save(path)


ATTRIBUTION = """\
The pictures in this folder are crops of images that come with scikit-image (skimage.data); labels were computed from them.

motorcycle      Middlebury Stereo 2014, D. Scharstein, H. Hirschmueller, Y. Kitajima, G. Krathwohl, N. Nesic, X. Wang and
                P. Westling, "High-resolution stereo datasets with subpixel-accurate ground truth", GCPR 2014
astronaut       NASA, public domain
coffee          Rachel Michetti, courtesy of Pikolo Espresso Bar, CC0
chelsea         Stefan van der Walt, CC0
rocket          SpaceX, public domain
"""
