"""Taskonomy's class scores: what their files hold -> probabilities, or why not."""

from pathlib import Path

import numpy as np
import pytest
import torch

from modsquad_ds.data.layouts import encode
from modsquad_ds.data.set_samples import probabilities
from modsquad_ds.errors import UserError
from taskonomy_files import key, npy, taskonomy
from test_taskonomy import change, listed


def test_scores_become_probabilities() -> None:
    def of(*scores: float) -> list[float]:
        found: list[float] = probabilities(torch.tensor(scores, dtype=torch.float64), len(scores)).tolist()
        return found

    assert of(0.25, 0.75) == [0.25, 0.75]
    assert of(0.25, 0.7509) == [0.25, 0.7509]  # sums to 1.0009: kept as it is
    assert of(0.25, 0.752) == pytest.approx([0.25 / 1.002, 0.752 / 1.002], rel=1e-12)
    assert of(0.5, 2.0) == [0.2, 0.8]
    assert of(-np.log(2.0), np.log(2.0)) == pytest.approx([0.2, 0.8], rel=1e-12)  # e^-a : e^a = 1/2 : 2
    assert probabilities(torch.tensor([[1.0, 3.0]]), 2).tolist() == [0.25, 0.75]


BAD_SCORES = [
    (npy(np.zeros(364, np.float32)), r"\.npy of shape \(364,\), expected 365 scores"),
    (npy(np.zeros((5, 73))), r"\.npy of shape \(5, 73\), expected 365 scores"),
    (npy(np.full(365, np.nan)), "holds scores that are not finite"),
    (npy(np.zeros(365)), "holds scores that are all 0"),
    (npy(np.array([{}] * 365), allow_pickle=True), r"\.npy of pickled objects, expected numbers"),
    (b"", r"empty \(0 bytes\)"),
]


def test_scores_that_mean_nothing_are_refused(tmp_path: Path) -> None:
    src = taskonomy(tmp_path / "src", ("class_scene", "edge_texture"))
    source = listed(src, "class_scene", "edge_texture")
    (sample,) = [sample for sample in source.samples if sample.key == key("bolton", 0)]
    for content, reason in BAD_SCORES:
        name = change(src, "class_scene", ("bolton", 0), lambda _, content=content: content)  # type: ignore[misc]
        members, (bad,) = encode(sample, src, source.labels)
        assert "class_scene.npy" not in members and "edge_texture.png" in members
        with pytest.raises(UserError, match=f"^{name}: {reason}$"):
            raise UserError(str(bad))
