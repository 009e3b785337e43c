"""Metric of boundaries: thinned, then matched one to one with the true ones within a small distance. No MATLAB.

The protocol of BSDS (Martin et al., 2004), as PASCAL-Context's figures have it: at each of 99 thresholds the predicted map is
thinned, and its pixels are matched with true ones at most `maxdist` of the image's diagonal away, each with one at most. The
counts of all images together give precision and recall; odsF is the F-measure at the best threshold for the whole dataset.

Thinning is scikit-image's `thin` to the pixel, for eight maps at a time, and scipy matches: 1 to 2 seconds of one core for an
image of 375 x 500 pixels. Where this is not BSDS's program `correspondPixels` to the letter:
- scipy finds the largest number of pairs. BSDS's program also asks for the least sum of distances, by a solver that is given a
  random part of the possibilities, and finds a few pairs fewer: 0 to 0.12 % on the contours of three photographs, which is
  less than 0.001 of F.
- Probabilities are not rounded to 8 bits first. A pixel is predicted where it is at least the threshold.
- True maps are thinned too, which changes nothing where they are thin already, and does where a map was scaled.
- All images count. The field's PASCAL-Context figures are of 2,498 of the 5,105 validation images.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import maximum_flow

from modsquad_ds.metrics.base import CountMetric

THRESHOLDS = (np.arange(1, 100) * 0.01).astype(np.float32)
"""float32 as probabilities are, so that a probability of 0.7 is not below the threshold 0.7."""

Mask = NDArray[np.bool_]


class Boundaries(CountMetric):
    """`odsF`. Counts per threshold: pairs, predicted pixels, true pixels."""

    shape = (3, len(THRESHOLDS))

    def add_image(self, prediction: Mapping[str, Any], label: Mapping[str, Any], meta: Mapping[str, Any]) -> None:
        """Prediction: `probability` `[h, w]`. Label: `values` `[h, w]` of 0 and 1, `valid` bool `[h, w]`."""
        valid = label["valid"].numpy()
        probability = np.where(valid, prediction["probability"].float().numpy(), -1.0)
        truth = (label["values"].numpy() > 0.5) & valid
        self.counts += torch.from_numpy(boundary_counts(probability, truth, self.row.maxdist))

    def compute(self) -> dict[str, float]:
        """2 P R / (P + R) with P = pairs / predicted and R = pairs / true, written without the quotients."""
        pairs, predicted, true = self.counts.double()
        return {"odsF": (2 * pairs / (predicted + true)).max().item() if true[0] else math.nan}


def boundary_counts(probability: NDArray[np.floating], truth: Mask, maxdist: float) -> NDArray[np.int64]:
    """Pairs, predicted and true pixels `[3, 99]` of one image at `THRESHOLDS`.

    Args:
        probability: `[h, w]`; -1 where nothing may be predicted.
        truth: `[h, w]`.
        maxdist: largest distance of a pair, as a share of the diagonal.
    """
    truth = _unpacked(thinned(truth.astype(np.uint8)), 0)
    reach = maxdist * math.hypot(*truth.shape)
    sizes = np.array([np.count_nonzero(probability >= threshold) for threshold in THRESHOLDS])
    # A lower threshold's mask contains a higher one's, so those of one size are the same.
    _, chosen, same = np.unique(sizes, return_index=True, return_inverse=True)
    found = []
    for start in range(0, len(chosen), 8):
        group = THRESHOLDS[chosen[start : start + 8]]
        packed = np.zeros(truth.shape, np.uint8)
        for bit, threshold in enumerate(group):
            packed |= (probability >= threshold).astype(np.uint8) << bit
        packed = thinned(packed)
        masks = [_unpacked(packed, bit) for bit in range(len(group))]
        found += [(matched_pixels(mask, truth, reach), np.count_nonzero(mask)) for mask in masks]
    return np.stack([*np.array(found).T[:, same], np.full(len(THRESHOLDS), np.count_nonzero(truth))])


def _unpacked(packed: NDArray[np.uint8], bit: int) -> Mask:
    return (packed >> bit & 1).astype(bool)


def thinned(maps: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Thin eight binary maps to lines of one pixel, each as `skimage.morphology.thin` does (Guo and Hall, CACM 32(3), 1989, A1).

    Args:
        maps: `[h, w]`; bit k is a pixel of map k.
    """
    height, width = maps.shape
    padded = np.zeros((height + 2, width + 2), np.uint8)
    inner = padded[1:-1, 1:-1]
    inner[:] = maps
    around = ((0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1), (1, 0), (1, 1))
    e, ne, n, nw, w, sw, s, se = (padded[1 + y : 1 + y + height, 1 + x : 1 + x + width] for y, x in around)
    while True:
        before: NDArray[np.uint8] = inner.copy()
        for half in range(2):
            ahead = (ne | n, nw | w, sw | s, se | e)
            behind = (e | ne, n | nw, w | sw, s | se)
            starts = (ahead[0] & ~e, ahead[1] & ~n, ahead[2] & ~w, ahead[3] & ~s)
            one_line = (starts[0] | starts[1] | starts[2] | starts[3]) & ~_two_of(*starts)
            no_end = _two_of(*ahead) & _two_of(*behind)
            no_inside = ~np.bitwise_and.reduce([*ahead, *behind])
            kept_side = (sw | s | ~nw) & w if half else (ne | n | ~se) & e
            inner &= ~(one_line & no_end & no_inside & ~kept_side)
        if np.array_equal(before, inner):
            return before


def _two_of(a: Any, b: Any, c: Any, d: Any) -> Any:
    """Bits that at least two of four maps have."""
    return a & b | c & d | (a | b) & (c | d)


def matched_pixels(a: Mask, b: Mask, reach: float) -> int:
    """Largest number of pairs of a pixel of `a` and a pixel of `b` at most `reach` pixels apart, each pixel in one at most.

    The largest flow through a network from a source to the pixels of `a`, on to their neighbours in `b`, and to a sink (Dinic's
    algorithm: tens of milliseconds for 10,000 pixels, where scipy's `maximum_bipartite_matching` took from 10 ms to 50 s).
    """
    of_a, of_b = _neighbours(a, b, reach)
    if not len(of_a):
        return 0
    a_ids, rows = np.unique(of_a, return_inverse=True)
    b_ids, columns = np.unique(of_b, return_inverse=True)
    source, sink = len(a_ids) + len(b_ids), len(a_ids) + len(b_ids) + 1
    middle = len(a_ids) + np.arange(len(b_ids))
    starts = np.concatenate([np.full(len(a_ids), source), rows, middle])
    ends = np.concatenate([np.arange(len(a_ids)), len(a_ids) + columns, np.full(len(b_ids), sink)])
    network = csr_matrix((np.ones(len(starts), np.int32), (starts, ends)), shape=(sink + 1, sink + 1))
    return int(maximum_flow(network, source, sink).flow_value)


def _neighbours(a: Mask, b: Mask, reach: float) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """All pairs within reach, as places in the flattened map with a margin."""
    margin = math.floor(reach)
    steps = np.arange(-margin, margin + 1)
    down, right = (axis.ravel() for axis in np.meshgrid(steps, steps, indexing="ij"))
    near = down**2 + right**2 <= reach**2
    padded_a, padded_b = np.pad(a, margin), np.pad(b, margin).ravel()
    shifts = down[near] * padded_a.shape[1] + right[near]
    places = np.flatnonzero(padded_a)
    targets = places[:, None] + shifts
    row, column = np.nonzero(padded_b[targets])
    return places[row], targets[row, column]
