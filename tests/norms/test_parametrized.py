"""Parametrized norms: the ILM layer computes its scale and shift as the norm did, and trains what the norm trained."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

import ilmconvert
from ilmconvert.nn import ILMNorm
from tests.helpers import relative, same_state

C = 16


class Positive(nn.Module):
    """A scale that cannot become negative."""

    def forward(self, raw: Tensor) -> Tensor:
        return nn.functional.softplus(raw)


def positive(norm: nn.Module) -> nn.Module:
    nn.init.normal_(norm.weight)
    return parametrize.register_parametrization(norm, "weight", Positive())


NORMS = {
    "weight_norm": (lambda: weight_norm(nn.LayerNorm(C), dim=None), (3, 5, C)),
    "own": (lambda: positive(nn.LayerNorm(C)), (3, 5, C)),
    "group": (lambda: positive(nn.GroupNorm(4, C)), (3, C, 4, 4)),
    "rms": (lambda: positive(nn.RMSNorm(C)), (3, 5, C)),
}


@pytest.mark.parametrize("kind", NORMS)
def test_parametrized_norm_stays_parametrized(kind: str, tmp_path: object) -> None:
    make, shape = NORMS[kind]
    model, x = nn.Sequential(nn.Identity(), make()), torch.randn(shape)
    before = copy.deepcopy(model)
    conversion = ilmconvert.convert(model, example_inputs=x)
    layer = conversion.model[1]
    assert isinstance(layer, ILMNorm)
    assert relative(model(x), conversion.model(x)) < 1e-6
    names = dict(model[1].named_parameters())
    assert {n for n, _ in layer.named_parameters() if not n.startswith("predictor")} == set(names)
    assert conversion.report.added_parameters == sum(p.numel() for p in layer.predictor.parameters())
    conversion.model(x).square().mean().backward()
    grads = {n: p.grad for n, p in layer.named_parameters()}
    assert all(grads[name] is not None for name in names)
    assert ilmconvert.verify(model, conversion.model, x).passed
    assert same_state(model, before)
    assert same_state(conversion.revert(), before)
    conversion.save(tmp_path / "saved")
    again = ilmconvert.load_conversion(tmp_path / "saved", model=copy.deepcopy(model))
    assert torch.equal(again.model(x), conversion.model(x))


def test_paper_mode_leaves_it() -> None:
    model = nn.Sequential(positive(nn.LayerNorm(C)), nn.LayerNorm(C))
    report = ilmconvert.convert(model, example_inputs=torch.randn(2, C), mode="paper").report
    assert [(d.path, d.code) for d in report.plan.decisions] == [("0", "parametrized"), ("1", None)]


def test_parametrized_layers_around_a_norm_are_left_alone() -> None:
    model = nn.Sequential(
        spectral_norm(nn.Conv2d(3, C, 3)), nn.GroupNorm(4, C), weight_norm(nn.Conv2d(C, C, 3)), nn.GroupNorm(4, C)
    ).eval()
    x = torch.randn(2, 3, 8, 8)
    conversion = ilmconvert.convert(model, example_inputs=x)
    assert [d.path for d in conversion.report.converted] == ["1", "3"]
    assert relative(model(x), conversion.model(x)) < 1e-6
    assert ilmconvert.verify(model, conversion.model, x).passed
    assert same_state(conversion.revert(), model)
