"""Conversions in parts, for the tests of them: tars of three samples, out of small ImageNet layouts unless told otherwise."""

from pathlib import Path

from layouts import contents
from modsquad_ds.data.convert import convert
from modsquad_ds.data.part_job import Part
from modsquad_ds.data.parts import convert_part, merge_parts
from modsquad_ds.data.shards import Index

PER_SHARD = 3


def part(
    src: Path, out: Path, number: int, total: int, *, merge: bool = False, skip_bad: bool = False, layout: str = "imagenet"
) -> Index | None:
    return convert_part(
        layout, src, out, "train", Part(number, total),
        merge=merge, samples_per_shard=PER_SHARD, skip_bad=skip_bad, progress=False,
    )  # fmt: skip


def merge(src: Path, out: Path, total: int, *, skip_bad: bool = False, layout: str = "imagenet") -> Index:
    return merge_parts(layout, src, out, "train", total, samples_per_shard=PER_SHARD, skip_bad=skip_bad, progress=False)


def one_piece(src: Path, out: Path, *, skip_bad: bool = False, layout: str = "imagenet") -> dict[str, bytes]:
    convert(layout, src, out, "train", samples_per_shard=PER_SHARD, skip_bad=skip_bad, progress=False)
    return contents(out / "train")


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)
