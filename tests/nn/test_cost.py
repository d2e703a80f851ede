"""What the fused paths may cost, counted: operations, and tensors as large as the input. No timing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ilmconvert.nn import ILMNorm, Standardization


class Count(TorchDispatchMode):
    """Operations, their kinds (views aside), and storages at least as large as the given tensors', beside these."""

    def __init__(self, *given: Tensor) -> None:
        super().__init__()
        self._bytes = given[0].untyped_storage().nbytes()
        self._seen = {x.untyped_storage().data_ptr() for x in given}
        self._alive: list[Tensor] = []  # addresses are used again once a tensor is gone
        self.operations = self.large = 0
        self.kinds: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.operations += 1
        if not func.is_view:
            self.kinds.add(str(func))
        for value in tree_leaves(out):
            if isinstance(value, Tensor) and value.untyped_storage().nbytes() >= self._bytes:
                pointer = value.untyped_storage().data_ptr()
                self.large += pointer not in self._seen
                self._seen.add(pointer)
                self._alive.append(value)
        return out


def count(module: nn.Module, x: Tensor) -> tuple[Count, Count]:
    """Of the forward and of the backward pass."""
    x = x.requires_grad_()
    with Count(x) as forward:
        y = module(x)
    grad = torch.ones_like(y)
    with Count(grad, x) as backward:
        torch.autograd.grad(y, [x, *module.parameters()], grad)
    return forward, backward


TOKEN = Standardization(layout="token")
GAINS = {"num_groups": 8, "gains": True, "standardized_keys": True}
BATCH_START = {"num_groups": 1, "num_key_groups": 1, "gains": True, "standardized_keys": True}
CASES = {  # base norm, arguments, input, operations (views too) in forward and in backward
    "sample": (nn.GroupNorm(8, 64), {"num_groups": 8}, (8, 64, 64, 64), (66, 78)),
    "gains": (nn.GroupNorm(8, 64), GAINS, (8, 64, 64, 64), (69, 94)),
    "token": (nn.LayerNorm(64), {"standardization": TOKEN}, (8, 49, 64), (43, 51)),
}


@pytest.mark.parametrize("case", CASES)
def test_no_normalised_copy_and_few_operations(case: str) -> None:
    base, arguments, shape, (most_forward, most_backward) = CASES[case]
    forward, backward = count(ILMNorm(64, **arguments), torch.randn(shape))
    assert forward.large == count(base, torch.randn(shape))[0].large == 1  # the output alone
    assert backward.large == 1  # the gradient alone
    assert forward.operations <= most_forward
    assert backward.operations <= most_backward


@pytest.mark.parametrize(
    ("arguments", "most"),
    [
        pytest.param(BATCH_START, ((1, 28, 11), (1, 47, 15)), id="key groups are norm groups"),
        pytest.param({"num_groups": 8}, ((2, 33, 10), (1, 39, 15)), id="other key groups"),  # theirs is normed in vain
    ],
)
def test_small_tensors_are_served_with_few_kinds_of_operations(
    arguments: dict[str, Any], most: tuple[tuple[int, int, int], ...]
) -> None:
    """Between convolutions it is each further kind that costs, since nothing of it is in any cache."""
    passes = count(ILMNorm(64, **arguments), torch.randn(4, 64, 16, 16))
    for one, (large, operations, kinds) in zip(passes, most, strict=True):
        assert one.large == large
        assert one.operations <= operations
        assert len(one.kinds) <= kinds


def test_a_silent_predictor_adds_a_look_at_the_weights_only() -> None:
    layer, x = ILMNorm(64, 8), torch.randn(4, 64, 16, 16)
    with torch.no_grad(), Count(x) as silent:
        layer(x)
    with torch.no_grad(), Count(x) as base:
        nn.GroupNorm(8, 64)(x)
    assert silent.large == base.large == 1
    assert silent.operations - base.operations <= 12
