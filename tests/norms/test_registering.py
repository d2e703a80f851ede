"""Handlers of the user's own: what they may leave out, and what they are told where they are wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ilmconvert
from ilmconvert.errors import IlmconvertError
from ilmconvert.nn import Standardization
from ilmconvert.norms import NormHandler, NormSpec, class_name, register
from ilmconvert.norms.registry import _TABLE

C = 8
TOKEN = Standardization(layout="token")


class GammaBeta(nn.Module):
    """A norm with names of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma, self.beta = nn.Parameter(torch.rand(C) + 0.5), nn.Parameter(torch.randn(C))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, (C,), self.gamma, self.beta)


@pytest.fixture
def handled() -> Iterator[Callable[..., nn.Module]]:
    """A model with such a norm, for a handler with these answers."""

    def make(describe: Any, affine: Any = None) -> nn.Module:
        body = {"family": "layer", "describe": lambda self, module: describe}
        if affine is not None:
            body["affine"] = lambda self, module, groups: affine(module)
        register(GammaBeta)(type("GammaBetaHandler", (NormHandler,), body))
        return nn.Sequential(nn.Linear(C, C), GammaBeta())

    yield make
    _TABLE.pop(class_name(GammaBeta), None)


def test_what_is_frozen_under_other_names_stays_frozen(handled: Callable[..., nn.Module]) -> None:
    model = handled(NormSpec((C,), 1, TOKEN), lambda m: (m.gamma, m.beta)).requires_grad_(False)
    x = torch.randn(3, C)
    conversion = ilmconvert.convert(model, example_inputs=x)
    assert torch.equal(conversion.model(x), model(x))
    assert [n for n, p in conversion.model.named_parameters() if p.requires_grad] == []
    model[1].beta.requires_grad_(True)
    trained = {n for n, p in ilmconvert.convert(model).model.named_parameters() if p.requires_grad}
    assert "1.predictor.encoder.weight" in trained


@pytest.mark.parametrize(
    ("describe", "affine", "message"),
    [
        (None, None, r"expected describe\(\) of GammaBetaHandler to return a NormSpec .*, got None"),
        (NormSpec(C, 1, TOKEN), None, r"a tuple for its shape, got NormSpec\(shape=8"),  # type: ignore[arg-type]
        (NormSpec((C,), 1, TOKEN), None, r"expected affine\(\) of GammaBetaHandler to return its scale and shift"),
        (NormSpec((C,), 1, TOKEN), lambda m: (m.gamma[:4], m.beta), r"expected 8 values of weight .*, got 4"),
    ],
    ids=["no spec", "no shape", "no affine", "too few"],
)
def test_a_wrong_handler_is_told(handled: Callable[..., nn.Module], describe: Any, affine: Any, message: str) -> None:
    with pytest.raises(IlmconvertError, match=message):
        ilmconvert.convert(handled(describe, affine))
