"""Metric of boundaries: thinned, then matched one to one with the true ones within a small distance. No MATLAB.

The protocol of BSDS (Martin et al., 2004), as PASCAL-Context's figures have it: at each of 99 thresholds the predicted map is
thinned, and its pixels are matched with true ones at most `maxdist` of the image's diagonal away, each with one at most. The
counts of all images together give precision and recall; odsF is the F-measure at the best threshold for the whole dataset.

scikit-image thins and scipy matches: for an image of 375 x 500 pixels 6 seconds of one core with thin lines, 25 where wide areas
are predicted; ranks share the images. Where this is not BSDS's program `correspondPixels` to the letter:
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
    from skimage.morphology import thin  # takes a second to import

    truth = thin(truth)
    reach = maxdist * math.hypot(*truth.shape)
    sizes = np.array([np.count_nonzero(probability >= threshold) for threshold in THRESHOLDS])
    # A lower threshold's mask contains a higher one's, so those of one size are the same.
    _, chosen, same = np.unique(sizes, return_index=True, return_inverse=True)
    masks = [thin(probability >= threshold) for threshold in THRESHOLDS[chosen]]
    found = [(matched_pixels(mask, truth, reach), np.count_nonzero(mask)) for mask in masks]
    return np.stack([*np.array(found).T[:, same], np.full(len(THRESHOLDS), np.count_nonzero(truth))])


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
