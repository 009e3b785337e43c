"""Images of a set on ranks: everyone has as many, and what counts is the same whatever the number of ranks."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from memory import assert_equal
from modsquad_ds.data.collate import Pixels, Ready
from modsquad_ds.data.set_batch import Pattern, Readers, Share, collate_set, collate_task, deal, filler
from modsquad_ds.targets import TARGETS

PIXELS = Pixels((120.0, 110.0, 100.0), (60.0, 60.0, 60.0), 4)


@st.composite
def micro_steps(draw: st.DrawFn) -> tuple[list[Pattern], int]:
    """What the images of a micro-step have, and a number of ranks that divides them."""
    world, tasks = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    images = world * draw(st.integers(1, 5))
    pattern = st.tuples(*[st.booleans()] * tasks)
    return draw(st.lists(pattern, min_size=images, max_size=images)), world


@settings(max_examples=150, deadline=None)
@given(micro_steps())
def test_every_pair_of_image_and_task_counts_once(step: tuple[list[Pattern], int]) -> None:
    patterns, world = step
    shares = deal(patterns, world)
    assert sorted(image for share in shares for image in share.images) == list(range(len(patterns)))
    assert len({len(share.images) for share in shares}) == 1 and all(list(s.images) == sorted(s.images) for s in shares)
    for task in range(len(patterns[0])):
        found = [share.readers[task] for share in shares]
        present = [image for image, pattern in enumerate(patterns) if pattern[task]]
        if found[0] is None:
            assert not present and not any(found)
            continue
        assert len({len(those.images) for those in found if those is not None}) == 1
        assert all(len(set(those.images)) == len(those.images) for those in found if those is not None)
        pairs = [(share, those) for share, those in zip(shares, found, strict=True) if those is not None]
        counted = [share.images[place] for share, those in pairs for place in those.images[: those.counted]]
        assert sorted(counted) == present
        most = max(those.counted for those in found if those is not None)
        assert most == len(found[0].images) or not any(map(any, patterns))
    assert any(share is not None for share in shares[0].readers)


@settings(max_examples=60, deadline=None)
@given(micro_steps())
def test_images_with_the_same_labels_are_spread_evenly(step: tuple[list[Pattern], int]) -> None:
    patterns, world = step
    shares = deal(patterns, world)
    assert shares == deal(list(patterns), world)
    for pattern in set(patterns):
        having = [sum(patterns[image] == pattern for image in share.images) for share in shares]
        assert max(having) - min(having) <= 1


def test_a_deal_by_hand() -> None:
    full, first, none = (True, True), (True, False), (False, False)
    # By pattern: image 3 (none), 1 and 2 (first), 0, 4 and 5 (full), in turns to ranks 0, 1, 0, 1, 0, 1.
    shares = deal([full, first, first, none, full, full], 2)
    assert shares[0] == Share((2, 3, 4), (Readers((0, 2, 1), 2), Readers((2, 0), 1)))
    assert shares[1] == Share((0, 1, 5), (Readers((0, 1, 2), 3), Readers((0, 2), 2)))


def test_a_step_without_any_label_keeps_one_row_that_does_not_count() -> None:
    assert deal([(False, False)] * 2, 2) == (Share((0,), (Readers((0,), 0), None)), Share((1,), (Readers((0,), 0), None)))
    # A task that nobody has is left out as long as another one is there.
    assert deal([(False, True)], 1) == (Share((0,), (None, Readers((0,), 1))),)


def entries_of(value: float) -> dict[str, dict[str, Tensor]]:
    return {
        "class_scene": {"probabilities": torch.full((365,), float(value)), "valid": torch.tensor(True)},
        "depth_zbuffer": {"values": torch.full((1, 4, 4), float(value)), "valid": torch.ones(4, 4, dtype=torch.bool)},
        "sal": {"values": torch.full((4, 4), float(value)), "valid": torch.ones(4, 4, dtype=torch.bool)},
        "semseg": {"labels": torch.full((4, 4), int(value))},
        "segment_unsup2d": {"labels": torch.full((4, 4), int(value))},
    }


def ready(value: float, without: tuple[str, ...] = ()) -> Ready:
    image = torch.full((3, 4, 4), int(value), dtype=torch.uint8)
    target = {name: entries for name, entries in entries_of(value).items() if name not in without}
    return Ready(image, target, {}, (0, 0, 4, 3))


def test_rows_and_targets_of_a_batch() -> None:
    names = tuple(entries_of(0))
    samples = [ready(1), ready(2, without=names), ready(3)]
    readers = {f"task of {name}": (TARGETS[name], Readers((0, 2, 1), 2)) for name in names}
    batch = collate_set(samples, ["a", "b", "c"], PIXELS, readers)
    assert batch.rows is not None and list(batch.rows) == list(batch.targets) == list(readers)
    for rows in batch.rows.values():
        assert rows.counted == 2 and rows.index_B.tolist() == [0, 2, 1] and rows.index_B.dtype == torch.int64
    scene, depth, sal, semseg, segments = batch.targets.values()
    assert scene["probabilities"].dtype == torch.float32 and scene["probabilities"][:, 0].tolist() == [1, 3, 0]
    assert scene["valid"].tolist() == [True, True, False]
    assert depth["values"].shape == (3, 1, 4, 4) and depth["valid"].shape == sal["values"].shape == (3, 4, 4)
    assert [bool(valid.all()) for valid in depth["valid"]] == [True, True, False] and not depth["valid"][2].any()
    assert not depth["values"][2].any() and not sal["valid"][2].any()
    assert semseg["labels"][:, 0, 0].tolist() == [1, 3, 255] and segments["labels"][:, 3, 3].tolist() == [1, 3, -1]
    assert semseg["labels"].dtype == segments["labels"].dtype == torch.int64
    assert batch.images_BCHW.shape == (3, 3, 4, 4) and batch.keys == ("a", "b", "c") and batch.meta == ({},) * 3
    assert batch.finish.area_B4 is not None and batch.finish.area_B4.tolist() == [[0, 0, 4, 3]] * 3


@pytest.mark.parametrize("name", entries_of(0))
def test_a_filler_is_like_the_real_thing(name: str) -> None:
    real, empty = entries_of(1)[name], filler(TARGETS[name], (4, 4))
    assert list(real) == list(empty)
    assert all(real[entry].shape == empty[entry].shape and real[entry].dtype == empty[entry].dtype for entry in real)
    assert not empty["valid"].any() if "valid" in empty else (empty["labels"] == empty["labels"][0, 0]).all()


def test_a_task_alone_has_no_rows() -> None:
    batch = collate_task([ready(1), ready(2)], ["a", "b"], PIXELS, TARGETS["sal"])
    assert batch.rows is None and set(batch.targets) == {"values", "valid"}
    assert_equal(batch.targets["values"], torch.tensor([1.0, 2.0])[:, None, None].expand(2, 4, 4).contiguous())
