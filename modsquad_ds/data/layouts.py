"""The table of dataset layouts: how each is listed, how one of its samples is encoded. A further layout is one row here.

Layouts: `imagenet` (class folders), `coco` (instances json + images), `ade20k` (images + annotations), `taskonomy` (a folder of
maps per task), `pascal_context` (a folder of labels per task). `read_source` lists, `encode` reads and checks one sample, in
worker processes.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from modsquad_ds.data import samples
from modsquad_ds.data.pascal_context import pascal_members, read_pascal_context
from modsquad_ds.data.samples import Labels, Sample
from modsquad_ds.data.set_samples import Encoded
from modsquad_ds.data.sources import NO_OPTIONS, Options, Source, read_ade20k, read_coco, read_imagenet
from modsquad_ds.data.taskonomy import read_taskonomy, view_members
from modsquad_ds.errors import UserError


class Layout(NamedTuple):
    """One row of the table."""

    read: Callable[[Path, str, Options], Source]
    members: Callable[[Sample, Path], Encoded] | None = None
    """For image sets; None: one label per image, which `samples.encode` knows by its kind."""
    options: tuple[str, ...] = ()
    """Fields of `Options` that it takes."""


def _alone(read: Callable[[Path, str], Source], src: Path, split: str, options: Options) -> Source:
    """A reader without options, called as if it had some."""
    return read(src, split)


LAYOUTS: dict[str, Layout] = {
    "imagenet": Layout(partial(_alone, read_imagenet)),
    "coco": Layout(partial(_alone, read_coco)),
    "ade20k": Layout(partial(_alone, read_ade20k)),
    "taskonomy": Layout(read_taskonomy, view_members, options=("split_list", "targets")),
    "pascal_context": Layout(read_pascal_context, pascal_members, options=("targets",)),
}


def read_source(layout: str, src: Path, split: str, options: Options = NO_OPTIONS) -> Source:
    """List `split` of the dataset at `src`.

    UserError if the layout is unknown, does not take one of the options, is not what lies at `src`, or cannot be read.
    """
    if layout not in LAYOUTS:
        raise UserError(f"unknown layout {layout!r}: expected one of {', '.join(LAYOUTS)}")
    for name, value in options._asdict().items():
        if value is not None and name not in LAYOUTS[layout].options:
            takers = ", ".join(other for other, row in LAYOUTS.items() if name in row.options)
            raise UserError(f"--{name.replace('_', '-')} is for layout {takers}: leave it out for {layout}")
    if not src.is_dir():
        raise UserError(f"source folder {src} does not exist: give the folder that holds the {layout} dataset")
    try:
        return LAYOUTS[layout].read(src, split, options)
    except OSError as error:
        raise UserError(f"cannot read {error.filename or src}: {error.strerror}: {layout} at {src} is not listed") from error


def encode(sample: Sample, root: Path, labels: Labels) -> Encoded:
    """Read and check one sample completely; its members, and labels that had to be left out. Raises BadSampleError."""
    members = LAYOUTS[labels.layout].members
    return Encoded(samples.encode(sample, root, labels), []) if members is None else members(sample, root)
