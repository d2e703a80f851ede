"""The fused paths against the plain formula, and everything that makes them step aside."""

from __future__ import annotations

import copy
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ilmconvert.nn import ILMNorm, Standardization, kernels
from ilmconvert.nn import ilm_norm as layer_module
from tests.helpers import relative

TOKEN = Standardization(layout="token")
CASES = {
    "group": ((3, 48, 5, 4), {"num_groups": 6}),
    "instance": ((2, 16, 3, 3), {"num_groups": 16}),
    "whole sample": ((2, 32, 6), {"num_groups": 1}),
    "keys across groups": ((2, 48, 6), {"num_groups": 3}),
    "long rows": ((2, 16, 1100), {"num_groups": 4}),
    "no spatial": ((4, 32), {"num_groups": 4}),
    "1x1": ((2, 32, 1, 1), {"num_groups": 4}),
    "paper": ((3, 48, 5, 4), {"num_groups": 6, "mode": "paper"}),
    "gains": ((3, 48, 5, 4), {"num_groups": 6, "gains": True}),
    "standardized": ((3, 48, 5, 4), {"num_groups": 6, "gains": True, "standardized_keys": True}),
    "blocks": ((3, 48, 5, 4), {"num_groups": 6, "gains": True, "standardized_keys": True, "num_blocks": 2}),
    "paper blocks": ((3, 48, 5, 4), {"num_groups": 6, "mode": "paper", "num_blocks": 2}),
    "paper standardized": ((3, 48, 5, 4), {"num_groups": 6, "mode": "paper", "standardized_keys": True}),
    "no affine": ((3, 48, 5, 4), {"num_groups": 6, "weight": False, "bias": False}),
    "token": ((3, 7, 48), {"standardization": TOKEN}),
    "token without bias": ((3, 7, 48), {"standardization": TOKEN, "bias": False}),
    "token without affine": ((3, 7, 48), {"standardization": TOKEN, "weight": False, "bias": False}),
    "token, many key groups": ((3, 7, 48), {"standardization": TOKEN, "num_key_groups": 12}),
    "one token": ((32,), {"standardization": TOKEN}),
    "position": ((2, 48, 5, 4), {"standardization": Standardization(layout="position")}),
}
CASES |= {  # an input with this format, or strides that no format has
    "group, channels_last": CASES["group"],
    "gains, channels_last": CASES["standardized"],
    "paper, channels_last": CASES["paper"],
    "group, channels_last_3d": ((2, 48, 3, 2, 4), {"num_groups": 6}),
    "group, strided": CASES["group"],
    "token, strided": CASES["token"],
    "position, channels_last": CASES["position"],
}


def formatted(case: str, x: Tensor) -> Tensor:
    if "strided" in case:
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if "channels_last" in case:
        return x.to(memory_format=torch.channels_last if x.ndim == 4 else torch.channels_last_3d)
    return x


def live(case: str, dtype: torch.dtype = torch.float64) -> tuple[ILMNorm, Tensor]:
    """A layer whose decoders speak, and an input."""
    shape, arguments = CASES[case]
    token = arguments.get("standardization") is TOKEN
    sizes = {"num_key_groups": 2, "hidden_features": 4} | arguments
    layer = ILMNorm(shape[-1] if token else shape[1], dtype=dtype, **sizes)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.7)
    if arguments.get("standardized_keys"):
        nn.init.normal_(layer.predictor.key_center)
        nn.init.uniform_(layer.predictor.key_scale, 0.5, 2.0)
    return layer, formatted(case, torch.randn(shape, dtype=dtype) + 0.3)


def gradient(y: Tensor) -> Tensor:
    """The same one in any dtype and memory format."""
    return torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(y.dtype)


@pytest.fixture(params=["small", "large"])
def size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small tensors are served by other kernels than large ones; a test of both takes all for the one or the other."""
    if request.param == "large":
        monkeypatch.setattr(kernels, "_SMALL", 0)


def run(layer: ILMNorm, x: Tensor) -> list[Tensor]:
    x = x.detach().clone().requires_grad_()
    y = layer(x)
    grads = torch.autograd.grad(y, [x, *layer.parameters()], gradient(y))
    return [y, *grads]


@pytest.mark.usefixtures("size")
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
    with mock.patch.object(layer_module, "plain_ilm_norm") as plain:
        y = layer(x)
    assert not plain.called
    layer.predictor.silence()
    with torch.no_grad():
        assert y.stride() == layer(x).stride()  # the base norm's own memory format


SOME = ["group", "token", "gains", "group, channels_last", "position"]


@pytest.mark.parametrize("case", [*SOME, "paper", "standardized", "blocks"])
def test_second_derivatives(case: str) -> None:
    layer, x = live(case)
    x = x[:1, :2].contiguous() if case == "token" else formatted(case, x[:1, :, :2, :2].contiguous())
    assert torch.autograd.gradgradcheck(layer, (x.requires_grad_(),), atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")  # torch's own forward-mode formulas use it
@pytest.mark.parametrize("case", [*SOME, "blocks"])
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


@pytest.mark.parametrize("case", SOME)
def test_checkpointing_and_deepcopy(case: str) -> None:
    layer, x = live(case)
    expected = run(layer, x)
    wrapped = x.clone().requires_grad_()
    y = checkpoint(copy.deepcopy(layer), wrapped, use_reentrant=False)
    y.backward(gradient(y))
    assert torch.equal(y, expected[0])
    assert torch.equal(wrapped.grad, expected[1])


@pytest.mark.parametrize("case", ["group", "token", "group, channels_last"])
def test_frozen_parts_get_no_gradient(case: str) -> None:
    layer, x = live(case)
    layer.predictor.requires_grad_(False)
    layer.weight.requires_grad_(False)
    layer(x).sum().backward()
    assert {n for n, p in layer.named_parameters() if p.grad is not None} == {"bias"}


@pytest.mark.usefixtures("size")
@pytest.mark.parametrize("case", SOME)
def test_an_activation_may_overwrite_the_output(case: str) -> None:
    layer, x = live(case)
    expected = run_with(layer, x, lambda y: torch.ones_like(y) * (y > 0))
    x.requires_grad_()
    nn.functional.relu(layer(x), inplace=True).sum().backward()
    assert torch.equal(x.grad, expected)


@pytest.mark.usefixtures("size")
@pytest.mark.parametrize("case", SOME)
def test_expanded_gradient(case: str) -> None:
    layer, x = live(case)
    ones = run_with(layer, x, lambda y: torch.ones_like(y))
    assert torch.allclose(ones, run_with(layer, x, lambda y: torch.ones((), dtype=y.dtype).expand_as(y)))


def run_with(layer: ILMNorm, x: Tensor, make: object) -> Tensor:
    x = x.detach().clone().requires_grad_()
    y = layer(x)
    return torch.autograd.grad(y, x, make(y))[0]


@pytest.mark.usefixtures("size")
@pytest.mark.parametrize("case", ["group", "token", "paper", "gains", "group, channels_last", "long rows", "position"])
@pytest.mark.parametrize("offset", [0.0, 1e2, 1e4])
def test_large_mean_against_small_variance(case: str, offset: float) -> None:
    """Outputs and the gradients of input, weight and bias, in float32 against float64."""
    layer, x = live(case, torch.float32)
    x = x + offset
    with mock.patch.object(layer_module, "fused_ilm_norm", return_value=None):
        reference = run(copy.deepcopy(layer).double(), x.double())
    for ours, exact in zip(run(layer, x)[:4], reference[:4], strict=True):
        assert relative(exact, ours) < 1e-3


@pytest.mark.parametrize("case", ["group", "gains", "token", "position"])
def test_large_mean_against_small_variance_compiled(case: str) -> None:
    layer, x = live(case, torch.float32)
    x = x + 1e4
    with mock.patch.object(layer_module, "fused_ilm_norm", return_value=None):
        reference = run(copy.deepcopy(layer).double(), x.double())
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    y = compiled(x.requires_grad_())
    ours = [y, *torch.autograd.grad(y, [x, layer.weight, layer.bias], gradient(y))]
    for value, exact in zip(ours, reference[:4], strict=True):
        assert relative(exact, value) < 1e-3


@pytest.mark.usefixtures("size")
def test_few_degenerate_channels_do_not_spoil_the_others() -> None:
    """Channels without variance, or far from zero, beside ordinary ones, in either memory format."""
    x = torch.randn(3, 48, 16, 16)
    x[:, 3], x[:, 7], x[1, 20] = 5.0, 0.0, x[1, 20] * 1e-3 + 300.0
    for given in (x, x.to(memory_format=torch.channels_last)):
        layer, _ = live("group", torch.float32)
        with mock.patch.object(layer_module, "fused_ilm_norm", return_value=None):
            reference = run(copy.deepcopy(layer).double(), given.double())
        for ours, exact in zip(run(layer, given), reference, strict=True):
            assert relative(exact, ours) < 1e-4


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


@pytest.mark.parametrize(
    "case",
    [
        "group",
        "gains",
        "group, channels_last",
        "token",
        "token without affine",
        "token, many key groups",
        "position",
    ],
)
def test_compiled_layers_are_equal(case: str) -> None:
    """Through autograd as inductor sees it; :mod:`benchmarks.speed` runs inductor itself."""
    layer, x = live(case)
    expected = run(layer, x)
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for ours, eager in zip(run(compiled, x), expected, strict=True):
        assert relative(eager, ours) < 1e-10 or (eager - ours).abs().max() < 1e-12


@pytest.mark.parametrize("case", [case for case in CASES if not CASES[case][1].get("gains")])
def test_a_silent_predictor_costs_nothing_in_inference(case: str) -> None:
    """Those with gains speak from the start, and are not looked at."""
    layer, x = live(case)
    layer.predictor.silence()
    expected = layer(x).detach()
    with torch.no_grad(), mock.patch.object(layer_module, "fused_ilm_norm") as fused:
        assert relative(expected, layer(x)) < 1e-12
        assert not fused.called
        layer.predictor.shift_decoder.weight[0, 0] = 1.0
        fused.return_value = x
        layer(x)
        assert fused.called


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("layer", "shape", "layout"),
    [
        (ILMNorm(48, mode="paper", standardization=TOKEN), (4, 8, 48), torch.contiguous_format),
        (ILMNorm(48, mode="paper", standardization=TOKEN), (4096, 48), torch.contiguous_format),
        (ILMNorm(32, 8), (4, 32, 4, 4), torch.contiguous_format),
        (ILMNorm(32, 8), (4, 32, 100, 100), torch.contiguous_format),
        (ILMNorm(32, 8), (4, 32, 8, 8), torch.channels_last),
    ],
    ids=["token", "many tokens", "small image", "image", "channels_last"],
)
def test_other_instances_do_not_feel_a_broken_one(
    layer: ILMNorm, shape: tuple[int, ...], layout: torch.memory_format, bad: float
) -> None:
    x = (torch.randn(shape) + 1e4).contiguous(memory_format=layout)
    broken = x.clone(memory_format=torch.preserve_format)
    broken[(0,) * x.ndim] = bad
    results = []
    for values in (x, broken):
        values.requires_grad_()
        y = layer(values)[1:]
        y.square().sum().backward()
        results.append((y.detach(), values.grad[1:]))
    for clean, found in zip(*results, strict=True):
        assert relative(found, clean) < 1e-3


def test_blocks_of_one_channel() -> None:
    layer = ILMNorm(4, 1, num_key_groups=4, hidden_features=8, num_blocks=4, mode="paper")
    x = torch.randn(2, 4, 4, 4, requires_grad=True)
    y = layer(x)
    y.square().sum().backward()
    twin, z = copy.deepcopy(layer).double(), x.detach().double().requires_grad_()
    with mock.patch.object(layer_module, "fused_ilm_norm", return_value=None):
        exact = twin(z)
    exact.square().sum().backward()
    assert relative(y, exact) < 1e-5
    assert relative(x.grad, z.grad) < 1e-4


def test_an_empty_batch_gives_gradients_of_zeros() -> None:
    layer = ILMNorm(32, 8)
    layer(torch.randn(0, 32, 4, 4)).sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in layer.parameters())


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    ("arguments", "shape"),
    [
        ({"num_features": 32, "num_groups": 1, "num_key_groups": 1, "hidden_features": 2}, (3, 32, 6, 5)),
        ({"num_features": 32, "num_groups": 2, "num_key_groups": 2, "hidden_features": 1}, (3, 32, 6, 5)),
        ({"num_features": 384, "standardization": TOKEN, "hidden_features": 1}, (3, 7, 384)),
        ({"num_features": 96, "standardization": TOKEN, "hidden_features": 1}, (3, 7, 96)),
        ({"num_features": 16, "standardization": TOKEN, "num_key_groups": 1}, (3, 7, 16)),
    ],
    ids=["one key group", "a narrow embedding", "tokens", "tokens of few key groups", "tokens of one key group"],
)
def test_gradients_have_the_strides_of_their_parameters(
    arguments: dict[str, Any], shape: tuple[int, ...], compiled: bool
) -> None:
    """Those with dimensions of one too: the buckets of DDP ask for them."""
    sizes = dict(arguments)
    layer = ILMNorm(sizes.pop("num_features"), **sizes)
    torch._dynamo.reset()
    forward = torch.compile(layer, backend="aot_eager") if compiled else layer
    forward(torch.randn(shape)).sum().backward()
    assert {n: p.grad.stride() for n, p in layer.named_parameters()} == {
        n: p.stride() for n, p in layer.named_parameters()
    }
