"""Classification: the mean of an image's patch tokens -> one linear layer -> cross-entropy."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modsquad_ds.model.heads.base import Head, LossTerm, Outputs, Prediction
from modsquad_ds.tasks import ClassificationTask


class Linear(Head):
    """Global average pooling and a linear classifier (arXiv 2306.17165 uses the same)."""

    def __init__(self, spec: ClassificationTask, dim: int, patch_size: int) -> None:
        super().__init__()
        self.label_smoothing = spec.head.label_smoothing
        self.linear = nn.Linear(dim, spec.num_classes)
        nn.init.trunc_normal_(self.linear.weight, std=0.02)
        nn.init.zeros_(self.linear.bias)

    def forward(self, map_BDHW: Tensor) -> Outputs:
        """`logits` `[B, C]`."""
        return {"logits": self.linear(map_BDHW.mean(dim=(2, 3)))}

    def losses(self, outputs: Outputs, targets: dict[str, Any]) -> dict[str, LossTerm]:
        """`ce`: cross-entropy summed over the images, against labels or, after Mixup and CutMix, probabilities."""
        logits_BC = outputs["logits"].float()
        target = targets["probabilities"] if "probabilities" in targets else targets["labels"]
        total = F.cross_entropy(logits_BC, target, reduction="sum", label_smoothing=self.label_smoothing)
        return {"ce": LossTerm(total, total.new_full((), len(logits_BC)), 1.0)}

    @torch.no_grad()
    def predict(self, outputs: Outputs, meta: Sequence[dict[str, Any]]) -> list[Prediction]:
        """`probabilities` and the likeliest `label` of each image."""
        probabilities_BC = outputs["logits"].float().softmax(dim=1).cpu()
        labels = probabilities_BC.argmax(dim=1).tolist()
        return [{"probabilities": p, "label": label} for p, label in zip(probabilities_BC, labels, strict=True)]
