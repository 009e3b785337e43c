"""Losses of the tasks of image sets: against loops over pixels and pairs with their gradients, by hand, over splits, with NaN."""

import math
from collections.abc import Callable, Iterator, Mapping
from itertools import combinations, product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from modsquad_ds import losses
from modsquad_ds.model.heads.base import LossTerm
from modsquad_ds.model.heads.map_losses import (
    ERRORS,
    TOUCHING,
    balanced,
    direction_cosine,
    direction_l1,
    image_terms,
    log_different,
    log_same,
    map_l1,
    map_mse,
    map_terms,
    paired_cells,
    pairs,
    soft_cross_entropy,
    soft_mse,
)
from modsquad_ds.targets import LOSSES
from set_tasks import CASES, Case, prediction_of, targets_of

ALL = pytest.mark.parametrize("case", CASES, ids=str)


def terms_of(case: Case, prediction: Tensor, targets: Mapping[str, Tensor]) -> dict[str, LossTerm]:
    """As the heads do it."""
    measure = image_terms if case.kind == "soft_classification" else map_terms
    return measure(case.spec(), prediction, targets)


def value(terms: Mapping[str, LossTerm]) -> Tensor:
    """The task's loss on one rank."""
    every = list(terms.values())
    return losses.weighted_mean_terms(
        [t.sum for t in every], [t.count for t in every], [t.weight for t in every], [t.part for t in every]
    )


# ---------------------------------------------------------------- twins: one pixel, one class, one pair at a time


def valid_pixels(targets: Mapping[str, Tensor]) -> Iterator[tuple[int, int, int]]:
    """Image, row and column of what counts."""
    for place in product(*(range(n) for n in targets["valid"].shape)):
        if targets["valid"][place]:
            yield place


def softmax(scores: list[Any]) -> list[Any]:
    total = sum(score.exp() for score in scores)
    return [score.exp() / total for score in scores]


def slow_image(case: Case, x: Tensor, targets: Mapping[str, Tensor]) -> Any:
    found = []
    for image in [i for i in range(len(x)) if targets["valid"][i]]:
        wanted = targets["probabilities"][image].tolist()
        if case.loss == "mse":
            found += [(x[image, c] - p) ** 2 for c, p in enumerate(wanted)]
        else:
            found.append(-sum(p * q.log() for p, q in zip(wanted, softmax(list(x[image])), strict=True)))
    return sum(found) / len(found)


def slow_semantic(case: Case, x: Tensor, targets: Mapping[str, Tensor]) -> Any:
    found = []
    for b, y, z in product(*(range(n) for n in targets["labels"].shape)):
        if (label := int(targets["labels"][b, y, z])) != 255:
            found.append(-softmax(list(x[b, :, y, z]))[label].log())
    return sum(found) / len(found)


def slow_map(case: Case, x: Tensor, targets: Mapping[str, Tensor]) -> Any:
    found = []
    for b, y, z in valid_pixels(targets):
        p, wanted = list(x[b, :, y, z]), targets["values"][b, :, y, z].tolist()
        if case.kind == "unit_vectors":
            length = sum(c**2 for c in p) ** 0.5
            p = [c / length for c in p]
        if case.loss == "cosine":
            found.append(1 - sum(c * w for c, w in zip(p, wanted, strict=True)))
        else:
            found += [abs(c - w) if case.loss == "l1" else (c - w) ** 2 for c, w in zip(p, wanted, strict=True)]
    return sum(found) / len(found)


def slow_binary(case: Case, x: Tensor, targets: Mapping[str, Tensor]) -> Any:
    pixels = list(valid_pixels(targets))
    yes = [place for place in pixels if targets["values"][place] == 1]
    weight = case.spec().row.positive_weight
    w = (len(pixels) - len(yes)) / len(pixels) if weight is None else weight
    found = []
    for b, y, z in pixels:
        probability = 1 / (1 + (-x[b, 0, y, z]).exp())
        found.append(-w * probability.log() if (b, y, z) in yes else -(1 - w) * (1 - probability).log())
    return sum(found) / len(pixels)


def slow_pairs(case: Case, x: Tensor, targets: Mapping[str, Tensor]) -> Any:
    found, stride = [], targets["labels"].shape[1] // x.shape[2]
    for b in range(len(x)):
        cells = list(product(range(x.shape[2]), range(x.shape[3])))
        label = {(i, j): int(targets["labels"][b, i * stride + stride // 2, j * stride + stride // 2]) for i, j in cells}
        for one, other in combinations([cell for cell in cells if label[cell] >= 0], 2):
            d2 = ((x[b, :, one[0], one[1]] - x[b, :, other[0], other[1]]) ** 2).sum()
            if label[one] == label[other]:
                found.append(-(2 / (1 + d2.exp())).log())
            else:
                found.append(-(1 - 2 / (1 + (d2 + TOUCHING).exp())).log())
    return sum(found) / len(found)


TWINS: dict[str, Callable[[Case, Tensor, Mapping[str, Tensor]], Any]] = {
    "soft_classification": slow_image, "semantic": slow_semantic, "regression": slow_map, "unit_vectors": slow_map,
    "binary": slow_binary, "segments": slow_pairs,
}  # fmt: skip


@ALL
def test_loss_and_gradient_equal_a_loop(case: Case) -> None:
    targets = targets_of(case)
    x = prediction_of(case).requires_grad_()
    fast = value(terms_of(case, x, targets))
    exact = x.detach().double().requires_grad_()
    slow = TWINS[case.kind](case, exact, targets)
    torch.testing.assert_close(fast, slow.float(), rtol=2e-5, atol=1e-6)
    (wanted,) = torch.autograd.grad(slow, exact)
    (found,) = torch.autograd.grad(fast, x)
    assert wanted.abs().max() > 1e-3
    torch.testing.assert_close(found, wanted.float(), rtol=1e-4, atol=2e-6)


def test_every_loss_of_every_kind_is_tried() -> None:
    assert {(case.kind, case.loss) for case in CASES} == {(kind, loss) for kind, of in LOSSES.items() for loss in of}
    assert set(ERRORS) == {(kind, loss) for kind in ("regression", "unit_vectors") for loss in LOSSES[kind]}


# ---------------------------------------------------------------- what holds for all


@ALL
def test_terms_add_up_over_any_split_and_the_loss_is_that_of_the_whole(case: Case) -> None:
    x, targets = prediction_of(case), targets_of(case)
    whole = terms_of(case, x, targets)
    for cut in (1, 2):
        halves = [
            terms_of(case, x[rows], {name: of[rows] for name, of in targets.items()})
            for rows in (slice(0, cut), slice(cut, None))
        ]
        for name, term in whole.items():
            sums = [half[name].sum for half in halves]
            torch.testing.assert_close(torch.stack(sums).sum(), term.sum, rtol=1e-5, atol=1e-6)
            assert sum(half[name].count.item() for half in halves) == term.count.item()
            if term.part is not None:
                assert sum(part.item() for half in halves if (part := half[name].part) is not None) == term.part.item()


@ALL
def test_rows_that_only_fill_up_change_nothing(case: Case) -> None:
    x, targets = prediction_of(case), targets_of(case)
    filler = targets_of(case, nothing=True)
    assert case.kind in ("semantic", "segments") or not filler["valid"].any()
    both = {name: torch.cat([of, filler[name]]) for name, of in targets.items()}
    longer = torch.cat([x, 3 * x]).requires_grad_()
    terms, expected = terms_of(case, longer, both), terms_of(case, x, targets)
    for name, term in terms.items():
        torch.testing.assert_close(term.sum, expected[name].sum, rtol=1e-6, atol=1e-6)
        assert term.count.item() == expected[name].count.item()
    (gradient,) = torch.autograd.grad(value(terms), longer)
    assert gradient[: len(x)].any() and not gradient[len(x) :].any()


@pytest.mark.parametrize("case", [case for case in CASES if case.kind not in ("semantic", "segments")], ids=str)
def test_what_is_invalid_may_be_nan(case: Case) -> None:
    x, targets = prediction_of(case), targets_of(case)
    name = "probabilities" if case.kind == "soft_classification" else "values"
    hidden = ~(targets["valid"] if targets["valid"].dim() == targets[name].dim() else targets["valid"].unsqueeze(1))
    assert hidden.any()
    broken = dict(targets) | {name: torch.where(hidden, math.nan, targets[name])}
    results = []
    for of in (targets, broken):
        leaf = x.clone().requires_grad_()
        loss = value(terms_of(case, leaf, of))
        results.append((loss.detach(), *torch.autograd.grad(loss, leaf)))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


@ALL
def test_nothing_valid_gives_zero_and_zero_gradients(case: Case) -> None:
    x = prediction_of(case).requires_grad_()
    targets = targets_of(case, nothing=True)
    if "values" in targets:
        targets["values"] = torch.full_like(targets["values"], math.nan)
    terms = terms_of(case, x, targets)
    assert all(term.sum.item() == 0 and term.count.item() == 0 for term in terms.values())
    (gradient,) = torch.autograd.grad(value(terms), x)
    assert torch.equal(gradient, torch.zeros_like(x))


@ALL
def test_bf16_predictions_are_compared_in_float32(case: Case) -> None:
    x, targets = prediction_of(case).bfloat16(), targets_of(case)
    for name, term in terms_of(case, x, targets).items():
        assert term.sum.dtype == term.count.dtype == torch.float32
        assert term.sum.item() == terms_of(case, x.float(), targets)[name].sum.item()


@ALL
def test_counts_need_no_gradient_and_nothing_waits_for_the_device(case: Case) -> None:
    """Tensors without contents: an operation that reads one on the host, or whose size depends on it, fails."""
    with FakeTensorMode():
        x = torch.empty(prediction_of(case).shape, dtype=torch.bfloat16, requires_grad=True)
        targets = {name: torch.empty(of.shape, dtype=of.dtype) for name, of in targets_of(case).items()}
        terms = terms_of(case, x, targets)
        value(terms).backward()
        assert x.grad is not None
        for term in terms.values():
            assert term.sum.requires_grad and term.sum.shape == term.count.shape == ()
            assert not term.count.requires_grad and (term.part is None or not term.part.requires_grad)
        with pytest.raises(DataDependentOutputException):
            next(iter(terms.values())).count.item()


@ALL
@pytest.mark.parametrize("factor", [0.0, 1e-30, 1e4])
def test_gradients_of_extreme_predictions_are_finite(case: Case, factor: float) -> None:
    """All zero is also what equal embeddings and a direction of no length are."""
    x = (prediction_of(case) * factor).requires_grad_()
    loss = value(terms_of(case, x, targets_of(case)))
    (gradient,) = torch.autograd.grad(loss, x)
    assert loss.isfinite() and gradient.isfinite().all() and gradient.abs().max() <= 1e4


# ---------------------------------------------------------------- by hand


def test_vector_losses_by_hand() -> None:
    x = torch.tensor([[math.log(3.0), 0.0], [9.0, 9.0]])  # softmax 3/4, 1/4
    p, valid = torch.tensor([[0.5, 0.5], [0.0, 1.0]]), torch.tensor([True, False])
    cross = soft_cross_entropy(x, p, valid)
    assert (cross.sum.item(), cross.count.item()) == (pytest.approx(0.5 * math.log(4 / 3) + 0.5 * math.log(4)), 1)
    square = soft_mse(torch.tensor([[1.0, 0.5], [9.0, 9.0]]), p, valid)
    assert (square.sum.item(), square.count.item()) == (0.25, 2)  # torch's MSELoss: 0.125


def test_map_losses_by_hand() -> None:
    x = torch.tensor([1.0, 2.0, 5.0, -2.0]).view(1, 2, 1, 2)  # left pixel (1, 5), right one (2, -2)
    values, valid = torch.zeros(1, 2, 1, 2), torch.tensor([[[True, False]]])
    for measure, total in ((map_l1, 6.0), (map_mse, 26.0)):
        term = measure(x, values, valid)
        assert (term.sum.item(), term.count.item(), term.weight, term.part) == (total, 2, 1.0, None)


def test_direction_losses_by_hand() -> None:
    x = torch.tensor([3.0, 4.0, 0.0]).view(1, 3, 1, 1)  # direction 0.6, 0.8, 0
    up, valid = torch.tensor([0.0, 1.0, 0.0]).view(1, 3, 1, 1), torch.ones(1, 1, 1, dtype=torch.bool)
    cosine, l1 = direction_cosine(x, up, valid), direction_l1(x, up, valid)
    assert (cosine.sum.item(), cosine.count.item()) == (pytest.approx(0.2, abs=1e-6), 1)
    assert (l1.sum.item(), l1.count.item()) == (pytest.approx(0.8, abs=1e-6), 3)  # 0.6 + 0.2 + 0, by elements


def test_balanced_loss_by_hand() -> None:
    x = torch.tensor([math.log(3.0), 0.0, 0.0, 7.0]).view(1, 1, 4)  # sigmoid 3/4, 1/2, 1/2
    y, valid = torch.tensor([[[1.0, 0.0, 0.0, 1.0]]]), torch.tensor([[[True, True, True, False]]])
    fixed = balanced(x, y, valid, 0.95)["balanced"]
    assert fixed.sum.item() == pytest.approx(0.95 * math.log(4 / 3) + 0.05 * 2 * math.log(2))
    assert (fixed.count.item(), fixed.part) == (3, None)
    free = balanced(x, y, valid, None)
    # Two of three are negative: w = 2/3.
    assert value(free).item() == pytest.approx((2 / 3 * math.log(4 / 3) + 1 / 3 * 2 * math.log(2)) / 3)
    assert {name: (t.count.item(), t.part.item() if t.part is not None else None) for name, t in free.items()} == {
        "positive": (3, 2), "negative": (3, 1),
    }  # fmt: skip


def test_pairs_by_hand() -> None:
    x = torch.tensor([0.0, 1.0, 3.0]).view(1, 1, 1, 3)  # squared distances 1, 9, 4
    term = pairs(x, torch.tensor([[[7, 7, 0]]]))
    apart = [1 - 2 / (1 + math.exp(d + TOUCHING)) for d in (9, 4)]
    by_hand = -math.log(2 / (1 + math.e)) - sum(map(math.log, apart))
    assert (term.sum.item(), term.count.item()) == (pytest.approx(by_hand, rel=1e-5), 3)
    assert pairs(x, torch.tensor([[[7, -1, 0]]])).count.item() == 1


def test_a_cells_label_is_its_centre_pixels() -> None:
    labels = torch.full((1, 8, 16), 5)
    labels[0, 4, 4], labels[0, 4, 12] = 1, 2
    embedding = torch.zeros(1, 4, 1, 2)
    assert pairs(embedding, labels).sum.item() == pytest.approx(-math.log(math.tanh(TOUCHING / 2)), rel=1e-3)
    labels[0, 4, 12] = 1
    assert pairs(embedding, labels).sum.item() == 0


def test_logs_of_similarities_are_exact_at_both_ends() -> None:
    d2 = torch.tensor([1e-7, 1e-3, 0.5, 5.0, 80.0, 1e4])
    apart = [math.log(math.tanh(d / 2)) if d < 20 else -2 * math.exp(-d) for d in d2.tolist()]
    together = [math.log(2) - d - math.log1p(math.exp(-d)) for d in d2.tolist()]
    torch.testing.assert_close(log_different(d2), torch.tensor(apart), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(log_same(d2), torch.tensor(together), rtol=1e-6, atol=1e-6)


# ---------------------------------------------------------------- which cells


def test_paired_cells_are_a_fair_draw_that_only_the_image_decides() -> None:
    labels = torch.randint(0, 3, (400, 60), generator=torch.Generator().manual_seed(0))
    drawn = paired_cells(labels, 20)
    assert drawn.shape == (400, 20)
    assert all(len(set(row)) == 20 for row in drawn.tolist())
    assert torch.equal(paired_cells(labels[7:8], 20), drawn[7:8]) and len({tuple(row) for row in drawn.tolist()}) == 400
    # 400 draws of 20 of 60 cells: 133 +- 9 of each, and two neighbours come together as often as any two: 43 +- 6.
    picked = torch.zeros(400, 60).scatter_(1, drawn, 1.0)
    assert (picked.sum(0) - 400 / 3).abs().max() < 5 * 9.4
    together = (picked[:, 1:] * picked[:, :-1]).sum(0)
    assert (together - 400 * 20 * 19 / (60 * 59)).abs().max() < 5 * 6.2


def test_paired_cells_have_labels_as_long_as_there_are_any() -> None:
    labels = torch.full((2, 50), -1)
    labels[0, 10:25], labels[1, 40:] = 3, 0
    drawn = paired_cells(labels, 12)
    assert (labels[0][drawn[0]] >= 0).all()
    assert sorted(cell for cell in drawn[1].tolist() if cell >= 40) == list(range(40, 50))
    assert sorted(paired_cells(labels, 300)[0].tolist()) == list(range(50))


def test_a_large_map_compares_300_cells_of_each_image() -> None:
    embedding = torch.randn(2, 4, 24, 24, generator=torch.Generator().manual_seed(1))
    labels = torch.randint(0, 5, (2, 24, 24), generator=torch.Generator().manual_seed(2))
    labels[1] = -1
    assert pairs(embedding, labels).count.item() == 300 * 299 / 2
