"""The figures, against their definitions written out."""

from __future__ import annotations

import math
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ilmconvert.errors import ModelError
from ilmconvert.metrics import Comparison, Scoring, agreement, contained, cosine, kl_divergence, logits_of


def pair(*shape: int) -> tuple[Tensor, Tensor]:
    a = torch.randn(*shape, dtype=torch.float64)
    return a, a + torch.randn_like(a)


@pytest.mark.parametrize("shape", [(40, 7), (6, 7, 3, 2), (40, 3)])
def test_figures_follow_their_definitions(shape: tuple[int, ...]) -> None:
    a, b = pair(*shape)
    rows = [t.flatten(2).transpose(1, 2).flatten(0, 1) if t.ndim > 2 else t for t in (a, b)]
    for i, (x, y) in enumerate(zip(*rows, strict=True)):
        p, q = x.softmax(0), y.softmax(0)
        assert agreement(a, b)[i] == (x.argmax() == y.argmax())
        assert contained(a, b)[i] == (int(x.argmax()) in y.argsort(descending=True)[:5])
        assert kl_divergence(a, b)[i].item() == pytest.approx((p * (p / q).log()).sum().item(), rel=1e-9)
        assert cosine(a, b)[i].item() == pytest.approx((x @ y / x.norm() / y.norm()).item(), rel=1e-9)
    warm = kl_divergence(a, b, temperature=2.0)
    assert torch.allclose(warm, kl_divergence(a / 2, b / 2))


@pytest.mark.parametrize("shape", [(40, 1), (6, 1, 3, 2)])
def test_a_single_logit_is_a_yes_or_no(shape: tuple[int, ...]) -> None:
    a, b = pair(*shape)
    x, y = (torch.distributions.Bernoulli(logits=t.flatten()) for t in (a, b))
    assert torch.equal(agreement(a, b), a.flatten().sign() == b.flatten().sign())
    assert torch.allclose(kl_divergence(a, b), torch.distributions.kl_divergence(x, y))
    scoring, labels = Scoring(), (a > 0).squeeze(1).long()
    scoring.update(b, labels)
    assert scoring.result().accuracy == agreement(a, b).double().mean().item()
    wanted = F.binary_cross_entropy_with_logits(b.flatten(), labels.flatten().double())
    assert scoring.result().loss == pytest.approx(wanted.item(), rel=1e-9)
    assert not agreement(a, b * torch.nan).any()


def test_sums_do_not_depend_on_the_batches() -> None:
    a, b = pair(31, 9)
    labels = torch.randint(0, 9, (31,))
    similarities, scores = [], []
    for size in (1, 8, 31):
        comparison, scoring = Comparison(), Scoring()
        for x, y, t in zip(a.split(size), b.split(size), labels.split(size), strict=True):
            comparison.update(x, y)
            scoring.update(y, t)
        similarities.append(asdict(comparison.reduce().result()))
        scores.append(asdict(scoring.reduce().result()))
    assert similarities[0]["answers"] == scores[0]["answers"] == 31
    assert similarities[0]["agreement"] == agreement(a, b).double().mean().item()
    assert scores[0]["accuracy"] == pytest.approx((b.argmax(1) == labels).double().mean().item())
    assert scores[0]["loss"] == pytest.approx(F.cross_entropy(b, labels).item())
    for first, *others in (similarities, scores):
        assert all(other == pytest.approx(first, rel=1e-12) for other in others)


def test_answers_that_are_not_finite_agree_with_nothing() -> None:
    a = torch.randn(4, 3)
    b = a.clone()
    b[0, 1], b[1, 0] = math.nan, math.inf
    assert agreement(a, b).tolist() == [False, False, True, True]
    assert contained(a, b).tolist() == [False, False, True, True]
    assert not agreement(b, b)[:2].any()
    comparison = Comparison()
    comparison.update(a, b)
    assert comparison.result().agreement == 0.5
    assert math.isnan(comparison.result().kl)


def test_half_precision_is_compared_in_float32() -> None:
    a, b = pair(64, 10)
    low = kl_divergence(a.bfloat16(), b.bfloat16())
    assert low.dtype == torch.float32
    assert torch.allclose(low.double(), kl_divergence(a, b), atol=0.05)


def test_logits_are_found_or_the_error_says_what_came() -> None:
    logits = torch.randn(2, 5)
    for output in (logits, (logits, 1), [logits], {"out": logits}, {"logits": logits}, SimpleNamespace(logits=logits)):
        assert logits_of(output) is logits
    for wrong in (torch.randn(3), {"boxes": logits}, None, ()):
        with pytest.raises(ModelError, match="expected the model to return logits"):
            logits_of(wrong)


def test_nothing_compared_is_an_error() -> None:
    with pytest.raises(ModelError, match="at least one image"):
        Comparison().result()
