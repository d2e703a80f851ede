"""What the owner of a converted function call goes on doing: in-place work, kinds of output, its class."""

from __future__ import annotations

import copy
from collections import OrderedDict

import pytest
import torch
from torch import Tensor, nn

import ilmconvert
from tests.models import OwnCall as Child

TOKENS = (3, 7, 16)


class AddsInPlace(Child):
    """A residual stream that its caller goes on with, and a number that is added to as well."""

    def forward(self, x: Tensor, stream: Tensor) -> Tensor:
        stream += torch.sin(x)
        width = x.shape[-1]
        stream *= width
        width += 1
        return super().forward(stream) * width


class Stream(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.add = AddsInPlace()

    def forward(self, x: Tensor) -> Tensor:
        stream = x.clone()
        return self.add(x, stream) + stream  # type: ignore[no-any-return]


class Answering(Child):
    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:  # type: ignore[override]
        return OrderedDict(out=super().forward(x), given=x)


class Registered(Child):
    """Of a base that wants to know of its subclasses."""

    def __init_subclass__(cls, name: str) -> None:
        assert name not in _REGISTERED
        _REGISTERED.add(name)


_REGISTERED: set[str] = set()


class Named(Registered, name="named"):
    pass


@pytest.mark.parametrize("model", [Stream(), Answering(), Named()], ids=lambda m: type(m).__name__)
def test_owner_does_what_it_did(model: nn.Module) -> None:
    x = torch.randn(TOKENS)
    conversion = ilmconvert.convert(model, example_inputs=x)
    assert len(conversion.report.converted) == 1
    want, got = model(x), conversion.model(x)
    assert type(got) is type(want)
    want, got = (list(y.values()) if isinstance(y, dict) else [y] for y in (want, got))
    assert len(got) == len(want)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert type(conversion.revert()) is type(model)


def test_owners_that_are_alike_stay_of_one_class() -> None:
    model = ilmconvert.convert(nn.Sequential(Child(), Child(), Answering())).model
    assert type(model[0]) is type(model[1]) is type(copy.deepcopy(model)[0])
    assert type(model[2]) is not type(model[0])
    torch.func.stack_module_state([model[0], model[1]])  # asks for it
