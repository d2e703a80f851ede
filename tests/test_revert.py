"""Undoing: the original norms come back, and everything else stays as it is now."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import ilmconvert
from ilmconvert.nn import ILMNorm
from tests.helpers import randomize_norms, same_state
from tests.models import AuxiliaryHead, Branching, Functional, TiedNorm, small_cnn

IMAGE = torch.randn(2, 3, 16, 16)


@pytest.mark.parametrize("make", [small_cnn, TiedNorm, Branching, AuxiliaryHead, Functional])
@pytest.mark.parametrize("mode", ["preserve", "paper"])
def test_revert_is_bit_identical(make: type[nn.Module], mode: str) -> None:
    model = randomize_norms(make())
    conversion = ilmconvert.convert(model, mode=mode, gains=True)
    reverted = conversion.revert()
    assert same_state(model, reverted)
    assert [type(m) for m in reverted.modules()] == [type(m) for m in model.modules()]
    assert conversion.report.converted
    assert any(isinstance(m, ILMNorm) for m in conversion.model.modules())  # the conversion itself stays


def test_revert_after_training_keeps_the_trained_rest() -> None:
    model = small_cnn()
    conversion = ilmconvert.convert(model)
    with torch.no_grad():
        conversion.model[0].weight.add_(1)
    reverted = conversion.revert()
    assert torch.equal(reverted[0].weight, model[0].weight + 1)
    assert torch.equal(reverted[1].running_var, model[1].running_var)


def test_revert_after_training_gives_the_original_norms() -> None:
    model = randomize_norms(nn.Sequential(nn.LayerNorm(8), nn.BatchNorm1d(8)))
    conversion = ilmconvert.convert(model)
    with torch.no_grad():
        for parameter in conversion.model.parameters():
            parameter.zero_()
    assert same_state(model, conversion.revert())
    assert {p.dtype for p in ilmconvert.convert(model).revert().double().parameters()} == {torch.float64}


def test_revert_follows_a_change_of_dtype() -> None:
    conversion = ilmconvert.convert(nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8)))
    conversion.model.double()
    assert conversion.revert()(torch.randn(2, 4, dtype=torch.float64)).dtype == torch.float64


def test_revert_follows_a_change_of_mode() -> None:
    for mode in (True, False):
        conversion = ilmconvert.convert(small_cnn().train(not mode))
        conversion.model.train(mode)
        assert {module.training for module in conversion.revert().modules()} == {mode}


def mixed(norm: nn.Module) -> nn.Module:
    """Parameters and weights in bfloat16, the rest as it was."""
    for parameter in norm.parameters(recurse=False):
        parameter.data = parameter.data.bfloat16()
    if "weight" in norm._buffers:
        norm.weight = norm.weight.bfloat16()
    return norm


MIXED = {
    "statistics": lambda: mixed(nn.BatchNorm2d(8)),
    "frozen": lambda: mixed(timm.layers.FrozenBatchNormAct2d(8)),
    "activation": lambda: mixed(timm.layers.BatchNormAct2d(8, act_layer=nn.PReLU)),
    "parametrized": lambda: weight_norm(nn.RMSNorm(8).bfloat16(), dim=None),
}


@pytest.mark.parametrize("kind", MIXED)
def test_revert_keeps_each_dtype_of_a_norm(kind: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), MIXED[kind]())
    for tensor in model[1].state_dict().values():
        tensor.copy_(torch.rand(tensor.shape) + 0.3)
    conversion = ilmconvert.convert(model)
    assert len({t.dtype for t in model.state_dict().values() if t.is_floating_point()}) == 2
    assert same_state(model, conversion.revert())
    conversion.model.double()
    assert same_state(copy.deepcopy(model).double(), conversion.revert())


def test_revert_follows_a_change_of_dtype_with_tied_parameters() -> None:
    model = nn.Sequential(nn.LayerNorm(8), nn.LayerNorm(8))
    model[1].weight = model[0].weight
    conversion = ilmconvert.convert(model)
    conversion.model.double()
    assert same_state(copy.deepcopy(model).double(), conversion.revert())


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_revert_after_a_forward_pass_that_computes_weights() -> None:
    """Old-style weight_norm leaves the result of a computation on the module, which deepcopy alone refuses."""
    model = nn.Sequential(torch.nn.utils.weight_norm(nn.Linear(4, 8)), nn.LayerNorm(8))
    model(torch.randn(2, 4))
    conversion = ilmconvert.convert(model)
    conversion.model(torch.randn(2, 4))
    assert same_state(model, conversion.revert())


class Shared(nn.Module):
    """Two norms with one scale, and one norm under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(8), nn.LayerNorm(8)
        self.second.weight = self.first.weight
        self.alias = self.first

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.alias(self.second(self.first(x)))


def test_reverted_norms_stay_tied_to_what_was_not_converted() -> None:
    conversion = ilmconvert.convert(Shared(), example_inputs=torch.randn(2, 8), exclude="second")
    with torch.no_grad():
        conversion.model.second.weight.mul_(2)
    reverted = conversion.revert()
    assert reverted.first.weight is reverted.second.weight
    assert torch.equal(reverted.first.weight, torch.full((8,), 2.0))


@pytest.mark.parametrize("name", ["first", "alias"])
def test_only_names_that_still_hold_the_layer_are_reverted(name: str) -> None:
    conversion = ilmconvert.convert(Shared(), example_inputs=torch.randn(2, 8))
    setattr(conversion.model, name, nn.Identity())
    reverted = conversion.revert()
    kinds = {n: type(getattr(reverted, n)) for n in ("first", "alias")}
    assert kinds == {"first": nn.LayerNorm, "alias": nn.LayerNorm} | {name: nn.Identity}
