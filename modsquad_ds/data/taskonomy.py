"""Taskonomy as it is distributed -> samples of an image set with up to 13 targets: where these data start.

    SRC/<task>/taskonomy/<building>/point_<P>_view_<V>_domain_<domain>.png or .npy   (or SRC/<task>/<building>/...)
    SRC/splits_taskonomy/train_val_test_{tiny,medium,full,fullplus}.csv              which building is of which split

A sample is a view, its key `<building>/point_<P>_view_<V>`. Its files are found by that name, never by their rank in a
listing. Layout: omnidata-tools' download.py; encodings: Taskonomy's data/README.md (arXiv 1804.08328).
"""

import re
from pathlib import Path

from torch import Tensor

from modsquad_ds.data.samples import IMAGE_EXTENSIONS, BadSample, BadSampleError, Sample, Size
from modsquad_ds.data.set_samples import Encoded, chosen_targets, classes_from_one, read_image, read_map, read_scores
from modsquad_ds.data.sources import Options, Source, files_in, usable
from modsquad_ds.data.target_files import mask_png
from modsquad_ds.errors import UserError
from modsquad_ds.targets import DEPTH_HOLE, TARGETS, TASKONOMY, TASKONOMY_MORE, VALID_FIELD, Target
from modsquad_ds.tasks import MULTILABEL

SPLIT_LISTS = ("tiny", "medium", "full", "fullplus")
"""The published lists of buildings."""
SPLITS = ("train", "val", "test")
_COLUMNS = ["id", *SPLITS]
DOMAINS = {"class_scene": "class_places", "segment_semantic": "segmentsemantic"}
"""Folders whose files carry another name than the folder's."""
FORBIDDEN = {
    "brinnon": "its images are not distributed",
    "darnestown": "its images are not distributed",
    "mosquito": "left out by omnidata's downloader",
    "rough": "some of its viewpoints are wrong",
    "tansboro": "left out by omnidata's downloader",
    "tomkins": "its images are not distributed",
    "woodbine": "left out by omnidata's downloader; its images are missing or damaged in many copies",
}
"""Buildings that are not read, as omnidata's downloader does not load them, and why."""
DEPTHS = ("depth_zbuffer", "depth_euclidean")
"""What says where `masked` targets mean something: the first of these that a view has."""
_FILE = re.compile(r"(point_\d+_view_\d+)_domain_(\w+)(\.\w+)", re.ASCII)
"""View, domain and extension."""
_BUILDING = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


def read_taskonomy(src: Path, split: str, options: Options) -> Source:
    """The views of the buildings that the split list gives to `split`.

    A sample's label: names of its targets, and of its depths, by which masked targets are judged whether they are targets or
    not. Views without an image, or without a target, and buildings without any folder are bad samples. UserError for a split
    list that is missing or malformed and for a target without a folder.
    """
    targets = chosen_targets("taskonomy", options.targets, TASKONOMY, TASKONOMY_MORE)
    path = list_path(src, options.split_list)
    listed = read_split_list(path)
    wanted = {building: line for building, (of, line) in listed.items() if of == split}
    if not wanted:
        raise UserError(f"{path}: has no building of split {split!r}: expected one of {', '.join(SPLITS)}")
    if not wanted.keys() - FORBIDDEN:
        reasons = ", ".join(f"{building} ({FORBIDDEN[building]})" for building in sorted(wanted))
        raise UserError(f"{path}: has only buildings of split {split!r} that are not read: {reasons}")
    below = "taskonomy/" if (src / "rgb/taskonomy").is_dir() else ""
    depths = _check_folders(src, below, targets)
    views = _Views(src, below, targets, depths)
    for building in sorted(wanted.keys() - FORBIDDEN):
        views.add(building, f"{path.name}, line {wanted[building]}")
    details = {
        "source_split": split,
        "split_list": path.name,
        "buildings": sorted(wanted.keys() - FORBIDDEN),
        "left_out": {building: FORBIDDEN[building] for building in sorted(wanted.keys() & FORBIDDEN)},
    }
    samples = usable(views.samples, views.bad)
    return Source(MULTILABEL, "taskonomy", src, split, (), samples, tuple(views.bad), details, targets)


# ---------------------------------------------------------------- split lists


def list_path(src: Path, name: str | None) -> Path:
    """The CSV of a published list, by its name, or a file. UserError if there is none."""
    known = ", ".join(SPLIT_LISTS)
    if name is None:
        raise UserError(f"--split-list is missing: taskonomy needs one of {known}, or a CSV file of columns {','.join(_COLUMNS)}")
    published = name in SPLIT_LISTS
    path = src / f"splits_taskonomy/train_val_test_{name}.csv" if published else Path(name)
    if not path.is_file():
        way = "unpack Taskonomy's splits_taskonomy.zip there" if published else f"expected a CSV file, or one of {known}"
        raise UserError(f"split list {path} {'is a folder' if path.is_dir() else 'does not exist'}: {way}")
    return path


def read_split_list(path: Path) -> dict[str, tuple[str, int]]:
    """Building -> its split and its line. Lines may end in CR alone, as in the published files, CR LF or LF.

    UserError naming file and line for another header, a row that is not a building and one flag of 1 among 0, and a building
    that is there twice: a building in two splits would be tested on what it was trained on.
    """
    try:
        lines = re.split(r"\r\n|\r|\n", path.read_bytes().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text at byte {error.start}: expected a CSV of {','.join(_COLUMNS)}") from error
    if _cells(lines[0]) != _COLUMNS:
        raise UserError(f"{path}, line 1: header is {lines[0]!r:.80}, expected {','.join(_COLUMNS)}")
    found: dict[str, tuple[str, int]] = {}
    for number, line in enumerate(lines[1:], start=2):
        if not line.strip():
            continue
        building, *flags = _cells(line)
        if not _BUILDING.fullmatch(building) or sorted(flags) != ["0", "0", "1"]:
            expected = "expected a building and three flags, one of them 1, the others 0"
            raise UserError(f"{path}, line {number}: {line!r:.80}: {expected}")
        if building in found:
            raise UserError(f"{path}, line {number}: building {building!r} is in line {found[building][1]} already")
        found[building] = SPLITS[flags.index("1")], number
    return found


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.split(",")]


# ---------------------------------------------------------------- views


def _check_folders(src: Path, below: str, targets: tuple[str, ...]) -> tuple[str, ...]:
    """Which depths there are. UserError for a folder that is missing: of the images, of a target, of depth to mask targets."""
    for name in ("rgb", *targets):
        folder = src / name / below
        if not folder.is_dir():
            way = "fetch it, or name the targets to read with --targets" if name in targets else "expected the images there"
            raise UserError(f"{folder} does not exist: {way}")
    depths = tuple(name for name in DEPTHS if (src / name / below).is_dir())
    masked = [name for name in targets if TARGETS[name].masked]
    if masked and not depths:
        reason = f"by it alone is known where {', '.join(masked)} mean something"
        raise UserError(f"{src / DEPTHS[0] / below} does not exist: {reason}: fetch it, or name other --targets")
    return depths if masked else ()


class _Views:
    """Collects the views of buildings."""

    def __init__(self, src: Path, below: str, targets: tuple[str, ...], depths: tuple[str, ...]) -> None:
        self.src, self.below, self.targets, self.depths = src, below, targets, depths
        self.samples: list[Sample] = []
        self.bad: list[BadSample] = []
        # Millions of views share few combinations of targets.
        self._labels: dict[tuple[tuple[str, ...], tuple[str, ...]], tuple[tuple[str, ...], tuple[str, ...]]] = {}

    def add(self, building: str, place: str) -> None:
        """List a building, which the split list names at `place`."""
        labels = {name: self._views_of(name, building) for name in dict.fromkeys((*self.targets, *self.depths))}
        images = self._views_of("rgb", building)
        folder = f"rgb/{self.below}{building}"
        if images is None:
            whole = all(views is None for views in labels.values())
            reason = "has no folder for any task" if whole else "has no folder with images"
            self.bad.append(BadSample(folder, f"is missing: building {building!r} ({place}) {reason}"))
            return
        known = {name: views or {} for name, views in labels.items()}
        for view, file in images.items():
            has = tuple(name for name in self.targets if view in known[name])
            if has:
                label = has, tuple(name for name in self.depths if view in known[name])
                self.samples.append(Sample(f"{building}/{view}", file, self._labels.setdefault(label, label)))
            else:
                self.bad.append(BadSample(file, "has none of the targets"))
        for view in sorted({view for name in self.targets for view in known[name]} - images.keys()):
            others = ", ".join(name for name in self.targets if view in known[name])
            self.bad.append(BadSample(f"{folder}/{view}_domain_rgb.png", f"is missing, the view has {others}"))

    def _views_of(self, task: str, building: str) -> dict[str, str] | None:
        """View -> its file below the source; None if the building has no folder there. Misnamed files go to `bad`."""
        folder = self.src / task / self.below / building
        if not folder.is_dir():
            return None
        domain, extensions = DOMAINS.get(task, task), _extensions(task)
        views: dict[str, str] = {}
        for name in files_in(folder):
            match = _FILE.fullmatch(name)
            file = f"{task}/{self.below}{building}/{name}"
            if match is None and not name.startswith("point_"):
                continue
            if match is None or match[2] != domain or match[3] not in extensions:
                expected = f"point_<P>_view_<V>_domain_{domain}{extensions[0]}"
                self.bad.append(BadSample(file, f"is not named as a file of this folder, expected {expected}"))
            elif match[1] in views:
                self.bad.append(BadSample(file, f"is of the same view as {Path(views[match[1]]).name}"))
            else:
                views[match[1]] = file
        return views


def _extensions(task: str) -> tuple[str, ...]:
    if task == "rgb":
        return (".png", *(one for one in IMAGE_EXTENSIONS if one != ".png"))
    return (".npy",) if TARGETS[task].stored == "npy" else (".png",)


# ---------------------------------------------------------------- one view


def view_members(sample: Sample, root: Path) -> Encoded:
    """Read and check one view completely: its image, its targets, and `valid.png` if some of these are masked.

    PNG files are stored as they are. Masked targets are not written, as if there were no files, where no depth says which of
    their pixels mean something, and where none does; nor are depths without any, and semantic segments without a class.
    BadSampleError if the image is bad or no target is left.
    """
    targets, _ = sample.label
    image = read_image(root, sample.image)
    labels, valid, bad = _labels(sample, root, image.size)
    shown = valid is not None and bool(valid.any())
    kept = [row for row in (TARGETS[name] for name in targets) if row.name in labels and (shown or not row.masked)]
    if not kept:
        judged = "it has no depth, by which its targets are judged" if valid is None else "it has no pixel of valid depth"
        without = judged if any(TARGETS[name].masked for name in targets) else "nothing on it is labelled"
        reason = "; ".join(map(str, bad)) or without
        raise BadSampleError(sample.image, f"no target is left of this view: {reason}")
    members = {IMAGE_EXTENSIONS[Path(sample.image).suffix]: image.data} | {row.field: labels[row.name] for row in kept}
    if valid is not None and any(row.masked for row in kept):
        members[VALID_FIELD] = mask_png(valid)
    return Encoded(members, bad)


def _labels(sample: Sample, root: Path, size: Size) -> tuple[dict[str, bytes], Tensor | None, list[BadSample]]:
    """Bytes of each target and depth that says something, where depth is valid (bool `[H, W]`; None: unknown), bad files."""
    targets, depths = sample.label
    labels: dict[str, bytes] = {}
    bad: list[BadSample] = []
    valid = None
    for name in dict.fromkeys((*depths, *targets)):
        row, file = TARGETS[name], _file_of(sample, name)
        if valid is not None and name not in targets:
            continue  # another depth said it already
        try:
            if row.stored == "npy":
                labels[name] = read_scores(root, file, row)
                continue
            data, values = read_map(root, file, row, size)
            data = classes_from_one(values, file, row) if row.kind == "semantic" else data
        except BadSampleError as error:
            bad.append(error.bad)
            continue
        if name in depths and valid is None:
            valid = values[0] != DEPTH_HOLE
        if _says_something(values, row):
            labels[name] = data
    return labels, valid, bad


def _says_something(values: Tensor, row: Target) -> bool:
    """Whether any pixel of a map does: of semantic segments one that has a class, of depths one that is no hole."""
    if row.kind == "semantic":
        return bool(values.any())
    return row.metres is None or bool((values != DEPTH_HOLE).any())


def _file_of(sample: Sample, task: str) -> str:
    """Path of one of the view's files, from its image's."""
    _, _, below = sample.image.partition("/")
    folder, _, name = below.rpartition("/")
    match = _FILE.fullmatch(name)
    assert match is not None, "listed by _views_of"
    return f"{task}/{folder}/{match[1]}_domain_{DOMAINS.get(task, task)}{_extensions(task)[0]}"
