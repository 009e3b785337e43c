"""Conversion in parts: whatever becomes of the parts, the shards are those of a conversion in one piece, or there are none."""

import json
import os
import shutil
from pathlib import Path

import pytest

import layouts
from layouts import all_samples, contents
from modsquad_ds import cli
from modsquad_ds.data import part_job
from modsquad_ds.data.layouts import read_source
from modsquad_ds.data.part_job import Part, fingerprint, parse_part
from modsquad_ds.data.parts import convert_part, merge_parts
from modsquad_ds.data.shards import ShardSet
from modsquad_ds.errors import UserError
from part_runs import PER_SHARD, flip, merge, one_piece, part, tree


@pytest.fixture
def src(tmp_path: Path) -> Path:
    """20 samples, so 7 tars."""
    return layouts.imagenet(tmp_path / "src", per_class=10)


def test_the_share_of_a_part(src: Path, tmp_path: Path) -> None:
    """By hand: 7 tars, 3 parts: 0 has tars 0, 3, 6 with 3 + 3 + 2 samples."""
    assert part(src, tmp_path / "out", 0, 3) is None
    record = json.loads((tmp_path / "out/.train.parts/part-0-of-3/part.json").read_text())
    assert [(entry["file"], entry["samples"]) for entry in record["shards"]] == [
        ("shard-00000.tar", 3), ("shard-00003.tar", 3), ("shard-00006.tar", 2),
    ]  # fmt: skip
    assert os.listdir(tmp_path / "out") == [".train.parts"]
    with pytest.raises(UserError, match=r"out/train does not exist"):
        ShardSet(tmp_path / "out/train")


@pytest.mark.parametrize("total", [1, 3, 7, 9])
def test_merged_parts_are_the_bytes_of_one_piece(src: Path, tmp_path: Path, total: int) -> None:
    out = tmp_path / "out"
    for number in reversed(range(total)):
        part(src, out, number, total)
    index = merge(src, out, total)
    assert contents(out / "train") == one_piece(src, tmp_path / "one")
    assert os.listdir(out) == ["train"]
    assert index == ShardSet(out / "train").index
    assert len({sample.key for sample in all_samples(ShardSet(out / "train"))}) == 20


@pytest.mark.parametrize("layout", ["coco", "ade20k"])
def test_other_layouts(tmp_path: Path, layout: str) -> None:
    src, out = layouts.MAKERS[layout](tmp_path / "src"), tmp_path / "out"
    assert part(src, out, 0, 2, layout=layout, merge=True) is None
    assert part(src, out, 1, 2, layout=layout, merge=True) is not None
    assert contents(out / "train") == one_piece(src, tmp_path / "one", layout=layout)


def test_with_several_processes_and_from_the_command_line(
    src: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    for number in range(2):
        cli.shards("imagenet", src, out, samples_per_shard=PER_SHARD, workers=2, part=f"{number}/2")
    cli.shards("imagenet", src, out, samples_per_shard=PER_SHARD, workers=2, merge=2)
    assert contents(out / "train") == one_piece(src, tmp_path / "one")
    printed = capsys.readouterr().out
    assert f"part 0/2: 11 samples in 4 shards in {out}/.train.parts/part-0-of-2" in printed
    assert f"{out}/train: 20 samples of 2 classes in 7 shards" in printed


# ---------------------------------------------------------------- bad samples


@pytest.fixture
def spoiled(src: Path, tmp_path: Path) -> Path:
    """3 samples that the listing rules out, one with a name that is not UTF-8; and tar 1 has none that decodes."""
    one_piece(src, tmp_path / "whole")
    keys = [row["key"] for row in json.loads((tmp_path / "whole/train/shard-00001.index.json").read_text())]
    lost = [sample.image for sample in read_source("imagenet", src, "train").samples if sample.key in keys]
    assert len(lost) == PER_SHARD
    for image in lost:
        (src / image).write_bytes(b"no image")
    layouts.save(layouts.picture(), src / "train/n01/a.b.jpg")
    Path(os.fsdecode(os.fsencode(src / "train/n01") + b"/\xff.jpg")).write_bytes(b"")
    (src / "train/n02/x.tiff").write_bytes(b"")
    return src


@pytest.mark.parametrize("total", [1, 3, 9])
def test_bad_samples_are_skipped_and_counted_over_all_parts(spoiled: Path, tmp_path: Path, total: int) -> None:
    out = tmp_path / "out"
    results = [part(spoiled, out, number, total, skip_bad=True, merge=True) for number in range(total)]
    index = results.pop()
    assert results == [None] * (total - 1)
    assert contents(out / "train") == one_piece(spoiled, tmp_path / "one", skip_bad=True)
    assert index is not None and (index.num_samples, index.skipped, len(index.shards)) == (17, 6, 6)
    assert part(spoiled, out, 0, total, skip_bad=True, merge=True) == index  # run again after all is over


def test_bad_samples_refuse_and_a_mended_part_is_written_anew(spoiled: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(UserError) as refused:
        part(spoiled, out, 0, 3)
    lines = str(refused.value).splitlines()
    assert lines[0] == f"3 bad and 8 good samples in part 0/3 of {spoiled} (imagenet, split train):"  # what the listing ruled out
    assert [line.split(":")[0] for line in lines[1:4]] == [
        r"  train/n01/\udcff.jpg", "  train/n01/a.b.jpg", "  train/n02/x.tiff",
    ]  # fmt: skip
    assert lines[4].endswith("--samples-per-shard 3 --part 0/3), or give --skip-bad")
    with pytest.raises(UserError, match=r"^3 bad and 3 good samples in part 1/3(.*\n)+.*does not decode"):
        part(spoiled, out, 1, 3)
    # The last part has no bad samples of its own: it waits for the others to be run again.
    assert part(spoiled, out, 2, 3, merge=True) is None
    before = tree(out)
    with pytest.raises(UserError) as refused:
        merge(spoiled, out, 3)
    lines = str(refused.value).splitlines()
    assert lines[0] == f"6 bad and 17 good samples in {spoiled} (imagenet, split train):"
    assert len(lines) == 10 and lines[7].startswith("leave them out with --skip-bad, or mend them")
    assert [line.split("--part ")[1] for line in lines[8:]] == ["0/3", "1/3"]
    assert tree(out) == before
    # They may still be left out, without a second run.
    shutil.copytree(out, tmp_path / "skipping")
    merge(spoiled, tmp_path / "skipping", 3, skip_bad=True)
    assert contents(tmp_path / "skipping/train") == one_piece(spoiled, tmp_path / "one", skip_bad=True)


def test_mended_files_are_read_again(src: Path, tmp_path: Path) -> None:
    out, file = tmp_path / "out", src / "train/n01/n01_0.JPEG"
    good = file.read_bytes()
    expected = one_piece(src, tmp_path / "one")
    file.write_bytes(b"no image")
    failed = []
    for number in range(3):
        try:
            part(src, out, number, 3)
        except UserError:
            failed.append(number)
    assert len(failed) == 1
    file.write_bytes(good)
    assert part(src, out, (failed[0] + 1) % 3, 3, merge=True) is None  # the whole array again, in any order
    assert part(src, out, failed[0], 3, merge=True) is not None
    assert contents(out / "train") == expected


def test_nothing_usable(tmp_path: Path) -> None:
    (tmp_path / "src/train/n01").mkdir(parents=True)
    (tmp_path / "src/train/n01/x.jpg").write_bytes(b"")
    part(tmp_path / "src", tmp_path / "out", 0, 2, skip_bad=True)
    with pytest.raises(UserError, match=r"no usable sample: 1 bad and 0 good.*\n  train/n01/x.jpg: is empty"):
        part(tmp_path / "src", tmp_path / "out", 1, 2, skip_bad=True, merge=True)


# ---------------------------------------------------------------- parts that do not fit


def test_everything_that_keeps_parts_from_being_merged_is_named_at_once(src: Path, tmp_path: Path) -> None:
    out, total = tmp_path / "out", 9
    for number in range(total):
        if number != 3:
            part(src, out, number, total)
    folder = out / ".train.parts"

    def record(number: int) -> Path:
        return folder / f"part-{number}-of-{total}/part.json"

    def change(number: int, **fields: object) -> None:
        record(number).write_text(json.dumps(json.loads(record(number).read_text()) | fields))

    flip(folder / "part-0-of-9/shard-00000.tar", 700)
    with open(folder / "part-1-of-9/shard-00001.tar", "ab") as file:
        file.write(b"x")
    (folder / "part-2-of-9/shard-00002.index.json").unlink()
    change(4, tool="modsquad_ds 0.0.1")
    change(5, samples_per_shard=1000)
    (entry,) = json.loads(record(6).read_text())["shards"]
    change(6, shards=[{**entry, "samples": 1}])
    change(7, shards=[entry])
    record(8).write_text("{")
    before = tree(out)
    with pytest.raises(UserError) as refused:
        merge(src, out, total)
    title, *rows = str(refused.value).splitlines()
    assert title == f"9 of 9 parts of {out}/train have to be run (again):"
    faults = [row.rpartition(": python -m modsquad_ds shards imagenet ") for row in rows]
    assert [fault.strip() for fault, _, _ in faults] == [
        "part 0/9 is damaged (shard-00000.tar differs from its checksum)",
        "part 1/9 is damaged (shard-00001.tar has 20481 bytes, 20480 were written)",
        "part 2/9 is damaged (shard-00002.index.json: No such file or directory)",
        "part 3/9 is missing",
        f"part 4/9 was written by modsquad_ds 0.0.1, this is {part_job.TOOL}",
        "part 5/9 was written with 1000 samples per shard, expected 3",
        "part 6/9 accounts for 1 of its 2 samples",
        "part 7/9 lists other tars than the 0 of its share",
        "part 8/9 has no readable part.json",
    ]
    assert [way for _, _, way in faults] == [
        f"{src} {out} --split train --samples-per-shard 3 --part {number}/9" for number in range(9)
    ]
    assert tree(out) == before
    for number in range(total - 1):
        assert part(src, out, number, total, merge=True) is None
    assert part(src, out, 8, total, merge=True) is not None
    assert contents(out / "train") == one_piece(src, tmp_path / "one")


def test_parts_of_another_listing_or_cut_are_not_merged(src: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    part(src, out, 0, 2)
    layouts.save(layouts.picture(99), src / "train/n01/new.png")
    assert part(src, out, 1, 2, merge=True) is None  # part 0 is still to come, from the new listing
    with pytest.raises(UserError, match=r"^1 of 2 parts .*\n  part 0/2 was written from another listing of .*/src \(files"):
        merge(src, out, 2)
    with pytest.raises(UserError, match=r"^4 of 4 parts .* \(again\); there are some of a cut into 2 parts:\n  part 0/4 is mis"):
        merge(src, out, 4)
    assert part(src, out, 0, 2, merge=True) is not None
    assert contents(out / "train") == one_piece(src, tmp_path / "one")


def test_the_fingerprint_sees_every_word_of_the_listing(tmp_path: Path) -> None:
    found = {fingerprint(read_source("coco", layouts.coco(tmp_path / "a"), "train"))}
    content = layouts.coco_content()
    content["annotations"][0]["bbox"][0] += 0.5
    found.add(fingerprint(read_source("coco", layouts.coco(tmp_path / "b/a", content=content), "train")))
    content["categories"][0]["name"] = "bat"
    found.add(fingerprint(read_source("coco", layouts.coco(tmp_path / "c/a", content=content), "train")))
    content["images"].append({})
    found.add(fingerprint(read_source("coco", layouts.coco(tmp_path / "d/a", content=content), "train")))
    assert len(found) == 4
    again = fingerprint(read_source("coco", layouts.coco(tmp_path / "e/a", content=content), "train"))
    assert again in found  # the folder above the source does not matter: nodes may mount it elsewhere


def test_what_one_piece_refuses_is_refused(src: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    one_piece(src / "train", out)  # a folder without splits
    for number in range(2):
        convert_part("imagenet", src / "train", out, "val", Part(number, 2), samples_per_shard=PER_SHARD, progress=False)
    with pytest.raises(UserError, match=r"no folder 'val', so its class folders .* and .*out/train holds the same"):
        merge_parts("imagenet", src / "train", out, "val", 2, samples_per_shard=PER_SHARD, progress=False)
    assert not (out / "val").exists()
    other = layouts.imagenet(tmp_path / "other", "val")
    (other / "val/n02").rename(other / "val/n03")
    with pytest.raises(UserError, match=r"'val' has other classes than"):
        convert_part("imagenet", other, out, "val", Part(0, 2), progress=False)
    with pytest.raises(UserError, match="parts: 0, expected 1 or more"):
        merge_parts("imagenet", src, out, "val", 0, progress=False)
    with pytest.raises(UserError, match=r"part 2/2: expected I/N"):
        convert_part("imagenet", src, out, "val", Part(2, 2), progress=False)
    with pytest.raises(UserError, match="exists and holds no shards"):
        convert_part("imagenet", src, src, "train", Part(0, 2), progress=False)


@pytest.mark.parametrize("text", ["8/8", "-1/8", "3", "1/2/3", "a/b", "/8", "0/0", "²/8"])
def test_part_that_is_none(text: str) -> None:
    with pytest.raises(UserError, match=f"--part {text}: expected I/N with I from 0 to N-1"):
        parse_part(text)
    assert parse_part("7/8") == (7, 8)


def test_options_that_do_not_go_together(src: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--overwrite does not go with --part"):
        cli.shards("imagenet", src, tmp_path / "out", workers=1, part="0/2", overwrite=True)
    with pytest.raises(UserError, match="--overwrite does not go with --part"):
        cli.shards("imagenet", src, tmp_path / "out", workers=1, merge=2, overwrite=True)
    with pytest.raises(UserError, match="--merge 3 with --part 0/2: expected --merge 2"):
        cli.shards("imagenet", src, tmp_path / "out", workers=1, part="0/2", merge=3)
    assert not (tmp_path / "out").exists()
