"""odsF: thinning and matching against hand-worked cases and the dumbest matching that could be right."""

import json
import math

import numpy as np
import pytest
import torch
from skimage.morphology import thin

from modsquad_ds.data.types import Finish, SubBatch
from modsquad_ds.metrics import Metric
from modsquad_ds.metrics.boundaries import THRESHOLDS, Mask, boundary_counts, matched_pixels
from modsquad_ds.metrics.build import RowMetrics
from modsquad_ds.targets import TARGETS


def mask_of(*rows: str) -> Mask:
    """Map whose `#` are true."""
    return np.array([[character == "#" for character in row] for row in rows])


def shown(metric: Metric, probability: np.ndarray, truth: Mask, valid: Mask | None = None) -> None:
    """Count in one image."""
    valid = np.ones_like(truth) if valid is None else valid
    label = {"values": torch.from_numpy(truth).float(), "valid": torch.from_numpy(valid)}
    sub = SubBatch(torch.zeros(0), {}, ("key",), ({"valid": True, "label": label},), Finish((0, 0, 0), (1, 1, 1)))
    metric.update([{"probability": torch.from_numpy(np.asarray(probability, np.float32))}], sub)


def most_pairs(a: Mask, b: Mask, reach: float) -> int:
    """By augmenting paths, one pixel after the other (Kuhn)."""
    pixels_a, pixels_b = ([tuple(p) for p in np.argwhere(m)] for m in (a, b))
    near = [[j for j, q in enumerate(pixels_b) if math.dist(p, q) <= reach] for p in pixels_a]
    partner: dict[int, int] = {}

    def place(i: int, seen: set[int]) -> bool:
        for j in near[i]:
            if j not in seen:
                seen.add(j)
                if j not in partner or place(partner[j], seen):
                    partner[j] = i
                    return True
        return False

    return sum(place(i, set()) for i in range(len(pixels_a)))


def every_choice(a: Mask, b: Mask, reach: float) -> int:
    """By trying all matchings, for a handful of pixels."""
    pixels_b = [tuple(p) for p in np.argwhere(b)]

    def best(rest: list[tuple[int, ...]], free: frozenset[int]) -> int:
        if not rest:
            return 0
        first, *others = rest
        near = [j for j in free if math.dist(first, pixels_b[j]) <= reach]
        return max([best(others, free), *(1 + best(others, free - {j}) for j in near)])

    return best([tuple(p) for p in np.argwhere(a)], frozenset(range(len(pixels_b))))


def test_a_line_one_pixel_off_by_hand() -> None:
    truth, found = np.zeros((60, 80), bool), np.zeros((60, 80), np.float32)
    truth[30, 10:50], found[31, 20:70] = True, 0.6
    # The diagonal is 100, so 0.0075 of it reach less than one pixel and 0.0125 reach one.
    assert boundary_counts(found, truth, 0.0075)[:, 0].tolist() == [0, 50, 40]
    assert boundary_counts(found, truth, 0.0125)[:, 0].tolist() == [30, 50, 40]
    # With each pixel matched two columns further left, at a distance of sqrt(5), two more have a partner.
    assert boundary_counts(found, truth, 0.0225)[:, 0].tolist() == [32, 50, 40]
    assert THRESHOLDS[59] == np.float32(0.6) and len(THRESHOLDS) == 99 and THRESHOLDS[98] == np.float32(0.99)
    counts = boundary_counts(found, truth, 0.0125)
    assert (counts[:, :60].T == [30, 50, 40]).all() and (counts[:, 60:].T == [0, 0, 40]).all()


def test_the_best_threshold_of_the_pooled_counts_by_hand() -> None:
    metric = RowMetrics(TARGETS["edge"])
    truth = mask_of("." * 9, ".####....", "." * 9)
    # Image 1: all four at 0.5 and two more pixels at 0.2; image 2: no boundary, a false one at 0.3.
    shown(metric, np.array([[0] * 9, [0, 0.5, 0.5, 0.5, 0.5, 0.2, 0.2, 0, 0], [0] * 9]), truth)
    shown(metric, np.array([[0] * 9, [0.3] * 3 + [0] * 6, [0] * 9]), np.zeros((3, 9), bool))
    # Up to 0.2: 4 pairs, 6 + 3 predicted; up to 0.3: 4 + 3; up to 0.5: 4 of 4.
    part = metric.parts["Boundaries"]
    assert [part.counts[:, i].tolist() for i in (0, 24, 44, 60)] == [[4, 9, 4], [4, 7, 4], [4, 4, 4], [0, 0, 4]]
    assert metric.compute() == {"odsF": 1.0}
    shown(metric, np.zeros((3, 9)), truth)
    assert metric.compute() == {"odsF": pytest.approx(2 * 4 / (4 + 8))}  # precision 1, recall 1/2


def test_a_pixel_is_matched_once_and_the_most_pairs_are_found() -> None:
    assert matched_pixels(mask_of("###"), mask_of(".#."), 1.0) == 1
    # The nearest pairing takes the middle ones together and leaves the outer ones without a partner.
    assert matched_pixels(mask_of("##..", "...."), mask_of("....", "#.#."), 1.5) == 2
    assert matched_pixels(mask_of("#.."), mask_of("..#"), 1.9) == 0
    assert matched_pixels(mask_of("#.."), mask_of("..#"), 2.0) == 1
    assert matched_pixels(mask_of("..."), mask_of("###"), 2.0) == 0
    # Rows do not run on into the next: the ends of two rows are far apart.
    assert matched_pixels(mask_of("..#", "..."), mask_of("...", "#.."), 1.5) == 0


def test_matching_against_all_choices_and_augmenting_paths() -> None:
    generator, differing = np.random.default_rng(0), 0
    for shape, share, check in [((4, 5), 0.25, every_choice)] * 40 + [((12, 17), 0.3, most_pairs)] * 20:
        a, b = generator.random((2, *shape)) < share
        for reach in (0.5, 1.0, 1.5, 2.3):
            found = matched_pixels(a, b, reach)
            assert found == check(a, b, reach) == matched_pixels(b, a, reach)
            differing += found < min(a.sum(), b.sum())
    assert differing > 50


def test_counts_against_one_threshold_after_the_other() -> None:
    """Thresholds between which nothing changes are not thinned again."""
    generator = np.random.default_rng(1)
    coarse = np.kron(generator.integers(0, 6, (5, 6)) / 7, np.ones((4, 4))).astype(np.float32)
    coarse[:, -1] = -1.0  # nothing is predicted there
    truth = generator.random(coarse.shape) < 0.2
    counts = boundary_counts(coarse, truth, 0.06)
    reach, lines = 0.06 * math.hypot(*truth.shape), thin(truth)
    for i, threshold in enumerate(THRESHOLDS):
        said = thin(coarse >= threshold)
        assert counts[:, i].tolist() == [most_pairs(said, lines, reach), said.sum(), lines.sum()]
    assert len({tuple(column) for column in counts.T}) > 3


def test_thick_lines_are_thinned_on_both_sides() -> None:
    thick = np.zeros((30, 40), bool)
    thick[10:15, 5:35] = True
    line = thin(thick)
    counts = boundary_counts(thick * np.float32(0.8), thick, 0.02)
    assert counts[:, 0].tolist() == [line.sum()] * 3 and line.sum() < 32


def test_pixels_that_are_not_valid_count_nowhere() -> None:
    metric, truth = RowMetrics(TARGETS["edge"]), np.zeros((40, 40), bool)
    truth[20] = True
    valid = np.ones_like(truth)
    valid[:, 30:] = False
    shown(metric, truth * 0.9, truth, valid)
    assert metric.parts["Boundaries"].counts[:, 0].tolist() == [30, 30, 30]


def test_without_a_true_boundary_there_is_nothing_to_measure() -> None:
    metric = RowMetrics(TARGETS["edge"])
    shown(metric, np.ones((4, 4)), np.zeros((4, 4), bool))
    metric.merge(json.loads(json.dumps([metric.state()])))
    assert math.isnan(metric.compute()["odsF"])
