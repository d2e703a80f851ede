"""The fused paths against the plain formula, and everything that makes them step aside."""

from __future__ import annotations

import copy
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ilmconvert.nn import ILMNorm, Standardization
from ilmconvert.nn import ilm_norm as layer_module
from tests.helpers import relative

TOKEN = Standardization(layout="token")
CASES = {
    "group": ((3, 48, 5, 4), {"num_groups": 6}),
    "instance": ((2, 16, 3, 3), {"num_groups": 16}),
    "whole sample": ((2, 32, 6), {"num_groups": 1}),
    "no spatial": ((4, 32), {"num_groups": 4}),
    "1x1": ((2, 32, 1, 1), {"num_groups": 4}),
    "paper": ((3, 48, 5, 4), {"num_groups": 6, "mode": "paper"}),
    "gains": ((3, 48, 5, 4), {"num_groups": 6, "gains": True}),
    "standardized": ((3, 48, 5, 4), {"num_groups": 6, "gains": True, "standardized_keys": True}),
    "blocks": ((3, 48, 5, 4), {"num_groups": 6, "gains": True, "standardized_keys": True, "num_blocks": 2}),
    "paper blocks": ((3, 48, 5, 4), {"num_groups": 6, "mode": "paper", "num_blocks": 2}),
    "no affine": ((3, 48, 5, 4), {"num_groups": 6, "weight": False, "bias": False}),
    "token": ((3, 7, 48), {"standardization": TOKEN}),
    "token without bias": ((3, 7, 48), {"standardization": TOKEN, "bias": False}),
    "token without affine": ((3, 7, 48), {"standardization": TOKEN, "weight": False, "bias": False}),
    "one token": ((32,), {"standardization": TOKEN}),
}


def live(case: str, dtype: torch.dtype = torch.float64) -> tuple[ILMNorm, Tensor]:
    """A layer whose decoders speak, and an input."""
    shape, arguments = CASES[case]
    token = "standardization" in arguments
    layer = ILMNorm(shape[-1] if token else shape[1], num_key_groups=2, hidden_features=4, dtype=dtype, **arguments)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.7)
    if arguments.get("standardized_keys"):
        nn.init.normal_(layer.predictor.key_center)
        nn.init.uniform_(layer.predictor.key_scale, 0.5, 2.0)
    return layer, torch.randn(shape, dtype=dtype) + 0.3


def run(layer: ILMNorm, x: Tensor) -> list[Tensor]:
    x = x.detach().clone().requires_grad_()
    torch.manual_seed(1)
    y = layer(x)
    grads = torch.autograd.grad(y, [x, *layer.parameters()], torch.randn_like(y))
    return [y, *grads]


@pytest.mark.parametrize("case", CASES)
def test_equal_to_the_plain_formula(case: str) -> None:
    layer, x = live(case)
    fast = run(layer, x)
    with mock.patch.object(layer_module, "fused_ilm_norm", return_value=None):
        slow = run(layer, x)
    for a, b in zip(slow, fast, strict=True):
        assert relative(a, b) < 1e-10 or (a - b).abs().max() < 1e-12


@pytest.mark.parametrize("case", CASES)
def test_the_fused_path_is_taken(case: str) -> None:
    layer, x = live(case)
    assert type(layer(x).grad_fn).__name__ == ("_TokenBackward" if "token" in case else "_SampleBackward")


@pytest.mark.parametrize("case", ["group", "token", "paper", "gains", "standardized", "blocks"])
def test_second_derivatives(case: str) -> None:
    layer, x = live(case)
    x = x[:1, :2] if case == "token" else x[:1, :, :2, :2]
    assert torch.autograd.gradgradcheck(layer, (x.contiguous().requires_grad_(),), atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")  # torch's own forward-mode formulas use it
@pytest.mark.parametrize("case", ["group", "token", "gains", "blocks"])
def test_functorch_and_forward_mode_step_aside(case: str) -> None:
    layer, x = live(case)
    parameters = dict(layer.named_parameters())

    def loss(p: dict[str, Tensor], sample: Tensor) -> Tensor:
        return torch.func.functional_call(layer, p, (sample.unsqueeze(0),)).pow(3).sum()

    per_sample = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    layer(x).pow(3).sum().backward()
    for name, parameter in parameters.items():
        assert relative(parameter.grad, per_sample[name].sum(0)) < 1e-10

    tangent = torch.randn_like(x)
    _, forward = torch.func.jvp(layer, (x,), (tangent,))
    numerical = (layer(x + 1e-6 * tangent) - layer(x - 1e-6 * tangent)) / 2e-6
    assert relative(numerical, forward) < 1e-6


@pytest.mark.parametrize("case", ["group", "token"])
def test_checkpointing_and_deepcopy(case: str) -> None:
    layer, x = live(case)
    expected = run(layer, x)
    wrapped = x.clone().requires_grad_()
    torch.manual_seed(1)
    y = checkpoint(copy.deepcopy(layer), wrapped, use_reentrant=False)
    y.backward(torch.randn_like(y))
    assert torch.equal(y, expected[0])
    assert torch.equal(wrapped.grad, expected[1])


@pytest.mark.parametrize("case", ["group", "token"])
def test_frozen_parts_get_no_gradient(case: str) -> None:
    layer, x = live(case)
    layer.predictor.requires_grad_(False)
    layer.weight.requires_grad_(False)
    layer(x).sum().backward()
    assert {n for n, p in layer.named_parameters() if p.grad is not None} == {"bias"}


def test_an_activation_may_overwrite_the_output() -> None:
    for case in ("group", "token"):
        layer, x = live(case)
        y = nn.functional.relu(layer(x.requires_grad_()), inplace=True)
        y.sum().backward()
        assert torch.isfinite(x.grad).all()


def test_expanded_gradient() -> None:
    for case in ("group", "token"):
        layer, x = live(case)
        ones = run_with(layer, x, lambda y: torch.ones_like(y))
        assert torch.allclose(ones, run_with(layer, x, lambda y: torch.ones((), dtype=y.dtype).expand_as(y)))


def run_with(layer: ILMNorm, x: Tensor, make: object) -> Tensor:
    x = x.detach().clone().requires_grad_()
    y = layer(x)
    return torch.autograd.grad(y, x, make(y))[0]


@pytest.mark.parametrize("case", ["group", "token", "paper"])
@pytest.mark.parametrize("offset", [0.0, 1e2, 1e4])
def test_large_mean_against_small_variance(case: str, offset: float) -> None:
    layer, x = live(case, torch.float32)
    x = x + offset
    with mock.patch.object(layer_module, "fused_ilm_norm", return_value=None):
        reference = copy.deepcopy(layer).double()(x.double())
    assert relative(reference, layer(x)) < 1e-3


def saved_bytes(module: nn.Module, x: Tensor) -> int:
    """Bytes of distinct storage kept for backward."""
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        module(x)
    return sum(kept.values())


@pytest.mark.parametrize(
    ("shape", "base", "limit"),
    [
        ((8, 256, 28, 28), nn.GroupNorm(32, 256), 1.05),
        ((4, 64, 56, 56), nn.GroupNorm(32, 64), 1.05),
        ((8, 2048, 7, 7), nn.GroupNorm(32, 2048), 1.05),
    ],
)
def test_no_more_is_saved_for_backward_than_group_norm_saves(
    shape: tuple[int, ...], base: nn.Module, limit: float
) -> None:
    x = torch.randn(shape, requires_grad=True)
    layer = ILMNorm(shape[1], 32)
    own = sum(p.numel() * p.element_size() for p in layer.parameters())
    theirs = sum(p.numel() * p.element_size() for p in base.parameters())
    assert (saved_bytes(layer, x) - own) / (saved_bytes(base, x) - theirs) < limit
