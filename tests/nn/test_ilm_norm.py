"""The layer against torch's norms, over layout, rank, width, dtype, memory format and batch size."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ilmconvert.nn import ILMNorm, Standardization
from tests.helpers import all_finite, relative

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 2e-2}


def token(**kwargs: object) -> Standardization:
    return Standardization(layout="token", **kwargs)


def rms_position(x: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(1, keepdim=True) + eps)


def simple(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.var(-1, keepdim=True) + 1e-5)


CASES = {
    "group 1d": ((2, 48, 9), 4, Standardization(), lambda x: F.group_norm(x, 4)),
    "group 2d": ((2, 64, 5, 7), 32, Standardization(), lambda x: F.group_norm(x, 32)),
    "group 3d": ((2, 24, 3, 4, 5), 3, Standardization(), lambda x: F.group_norm(x, 3)),
    "group no spatial": ((4, 60), 10, Standardization(), lambda x: F.group_norm(x, 10)),
    "group prime width": ((2, 37, 4, 4), 1, Standardization(), lambda x: F.group_norm(x, 1)),
    "layer over the sample": ((2, 40, 6, 6), 1, Standardization(eps=1e-3), lambda x: F.group_norm(x, 1, eps=1e-3)),
    "instance": ((2, 20, 6, 5), 20, Standardization(), lambda x: F.instance_norm(x)),
    "token": ((2, 5, 96), 1, token(), lambda x: F.layer_norm(x, (96,))),
    "token channels-last image": ((2, 7, 7, 40), 1, token(), lambda x: F.layer_norm(x, (40,))),
    "several trailing dimensions": ((3, 6, 4, 5), 1, token(), lambda x: F.layer_norm(x, (6, 4, 5))),
    "position": (
        (2, 24, 5, 5),
        1,
        Standardization(layout="position"),
        lambda x: F.layer_norm(x.movedim(1, -1), (24,)).movedim(-1, 1),
    ),
    "rms token": ((2, 5, 64), 1, token(center=False, scale_by="rms"), lambda x: F.rms_norm(x, (64,), eps=1e-5)),
    "rms position": (
        (2, 24, 5, 5),
        1,
        Standardization(layout="position", center=False, scale_by="rms"),
        lambda x: rms_position(x, 1e-5),
    ),
    "simple": ((2, 5, 64), 1, token(center=False, unbiased=True), simple),
}


def shape_of(case: str) -> tuple[int, ...]:
    size, _, how, _ = CASES[case]
    if case == "several trailing dimensions":
        return size[1:]
    return (size[-1],) if how.layout == "token" else (size[1],)


def make(case: str, dtype: torch.dtype = torch.float32, **kwargs: object) -> ILMNorm:
    _, groups, how, _ = CASES[case]
    layer = ILMNorm(shape_of(case), groups, standardization=how, dtype=dtype, **kwargs)
    with torch.no_grad():
        layer.weight.uniform_(0.5, 1.5)
        layer.bias.normal_()
    return layer


def expected(case: str, x: Tensor, layer: ILMNorm) -> Tensor:
    """The base norm in double precision, with the layer's scale and shift."""
    shape = layer.weight.shape if CASES[case][2].layout == "token" else (-1, *[1] * (x.ndim - 2))
    base = CASES[case][3](x.double())
    return base * layer.weight.double().reshape(shape) + layer.bias.double().reshape(shape)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_preserve_starts_as_the_base_norm(case: str, dtype: torch.dtype) -> None:
    layer = make(case, dtype)
    x = torch.randn(CASES[case][0]).mul(3).add(1).to(dtype)
    y = layer(x)
    assert y.dtype == dtype
    assert y.shape == x.shape
    assert relative(expected(case, x, layer), y) < TOLERANCE[dtype]


@pytest.mark.parametrize("case", [c for c, v in CASES.items() if len(v[0]) == 4 and v[2].layout != "token"])
def test_channels_last_is_kept_and_equal(case: str) -> None:
    layer = make(case)
    x = torch.randn(CASES[case][0])
    y = layer(x.to(memory_format=torch.channels_last))
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert relative(layer(x), y) < 1e-6
    assert layer(x).is_contiguous() or layer.standardization.layout == "position"  # as LayerNorm2d itself


@pytest.mark.parametrize("gains", [False, True])
@pytest.mark.parametrize("mode", ["preserve", "paper"])
@pytest.mark.parametrize("case", ["group 2d", "instance", "token", "position", "several trailing dimensions"])
def test_gradients_are_right(case: str, mode: str, gains: bool) -> None:
    """Numerical derivatives of input and every parameter, with decoders that are not silent."""
    shape = {"several trailing dimensions": (2, 4, 2, 3), "token": (3, 6)}.get(case, (2, 4, 3, 2))
    how = CASES[case][2]
    channels = shape[1:] if case.startswith("several") else shape[-1:] if how.layout == "token" else shape[1:2]
    groups = {"group 2d": 2, "instance": 4}.get(case, 1)
    layer = ILMNorm(channels, groups, standardization=how, num_key_groups=2, hidden_features=2, mode=mode, gains=gains)
    layer.double()
    names = [name for name, _ in layer.named_parameters()]
    values = [torch.randn_like(p) for p in layer.parameters()]

    def function(x: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))

    x = torch.randn(shape, dtype=torch.float64)
    inputs = tuple(t.requires_grad_() for t in (x, *values))
    assert torch.autograd.gradcheck(function, inputs, eps=1e-6, atol=1e-6)
    assert len(values) == (7 if gains else 5)


@pytest.mark.parametrize("shape", [(1, 16, 1, 1), (2, 16), (1, 1, 4, 4), (1, 1, 1, 1), (3, 16, 1)])
@pytest.mark.parametrize("mode", ["preserve", "paper"])
def test_tiny_inputs_are_finite(shape: tuple[int, ...], mode: str) -> None:
    for groups in {1, shape[1]}:  # one value per group among them
        layer = ILMNorm(shape[1], groups, mode=mode)
        x = torch.randn(shape, requires_grad=True)
        y = layer(x)
        y.square().sum().backward()
        assert all_finite((y, x.grad, *(p.grad for p in layer.parameters())))


def test_both_decoders_learn_from_the_start() -> None:
    """The paired encoder leaves a live unit whatever the signs of the key features."""
    for seed in range(20):
        torch.manual_seed(seed)
        layer = ILMNorm(64, 8)
        layer(torch.randn(2, 64, 4, 4) - 2).pow(3).sum().backward()
        assert layer.predictor.scale_decoder.weight.grad.abs().max() > 0
        assert layer.predictor.shift_decoder.weight.grad.abs().max() > 0


def test_gains_of_one_are_the_paper() -> None:
    plain = ILMNorm(32, 4, mode="paper")
    gained = ILMNorm(32, 4, mode="paper", gains=True)
    missing = gained.load_state_dict(plain.state_dict(), strict=False).missing_keys
    x = torch.randn(2, 32, 3, 3)
    assert missing == ["scale_gain", "shift_gain"]
    assert not any("gain" in key for key in plain.state_dict())
    assert torch.equal(plain(x), gained(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_returns_what_torch_returns(dtype: torch.dtype) -> None:
    """Statistics stay in float32: only the input and the output are rounded."""
    x = (torch.randn(2, 32, 8, 8) * 2 + 30).to(dtype)
    layer, base = ILMNorm(32, 4), nn.GroupNorm(4, 32)
    with torch.autocast("cpu", torch.bfloat16):
        y, reference = layer(x), base(x)
    assert y.dtype == reference.dtype
    assert relative(base(x.float()), y) < (1e-5 if dtype is torch.float32 else 5e-3)


def test_large_offset_keeps_its_digits() -> None:
    x = torch.randn(2, 64, 16, 16) + 1e4
    layer = ILMNorm(64, 8, mode="paper")
    assert relative(copy.deepcopy(layer).double()(x.double()), layer(x)) < 1e-3


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 200), st.integers(1, 64), st.integers(1, 9))
def test_any_width_makes_a_layer(channels: int, wanted: int, positions: int) -> None:
    from ilmconvert.nn.grouping import divisors, key_groups, nearest_groups

    groups = nearest_groups(channels, wanted, positions=positions)
    assert channels % groups == 0
    alone = channels // groups * positions == 1
    assert not alone or channels * positions == 1  # a group of one value only where there is nothing else
    better = [d for d in divisors(channels) if channels // d * positions > 1]
    assert all(max(groups, wanted) / min(groups, wanted) <= max(d, wanted) / min(d, wanted) + 1e-6 for d in better)
    layer = ILMNorm(channels, groups, num_key_groups=key_groups(channels, positions=positions))
    assert torch.isfinite(layer(torch.randn(1, channels, positions))).all()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_rms_without_eps_takes_the_machine_epsilon_that_torch_takes(dtype: torch.dtype) -> None:
    x = torch.randn(4, 64).mul(1e-4).to(dtype)
    layer = ILMNorm(64, standardization=token(center=False, scale_by="rms", eps=None), bias=False, dtype=dtype)
    assert relative(F.rms_norm(x, (64,)), layer(x)) < TOLERANCE[dtype]


def test_unbatched_input() -> None:
    layer = ILMNorm(6, 6, standardization=Standardization(unbatched_ndim=3))
    x = torch.randn(6, 5, 4)
    assert relative(F.instance_norm(x.unsqueeze(0)).squeeze(0), layer(x)) < 1e-5


def test_deepcopy_pickle_and_plain_fx() -> None:
    layer = ILMNorm(32, 4, gains=True, mode="paper")
    x = torch.randn(2, 32, 3, 3)
    y = layer(x)
    assert torch.equal(copy.deepcopy(layer)(x), y)
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x), y)
    traced = torch.fx.symbolic_trace(nn.Sequential(nn.Conv2d(3, 32, 1), layer))
    assert [n.target.__name__ for n in traced.graph.nodes if n.op == "call_function"].count("ilm_norm") == 1
    image = torch.randn(2, 3, 4, 4)
    assert torch.equal(traced(image), layer(traced.get_submodule("0")(image)))


@pytest.mark.parametrize(
    ("make_it", "message"),
    [
        (lambda: ILMNorm(30, 4), "expected num_groups to divide its 30 channels, got 4; the nearest that does is 5"),
        (lambda: ILMNorm(30, num_key_groups=0), "expected num_key_groups to divide"),
        (lambda: ILMNorm(8, mode="exact"), "expected mode 'preserve' or 'paper', got 'exact'"),
        (lambda: Standardization(scale_by="rms"), "expected center=False with scale_by='rms'"),
        (lambda: Standardization(layout="tokens"), "expected layout among .*'token'.*, got 'tokens' and 'var'"),
        (
            lambda: ILMNorm(8)(torch.nested.nested_tensor([torch.randn(1, 8)], layout=torch.jagged)),
            "a dense tensor, got a nested one",
        ),
        (lambda: ILMNorm(8)(torch.randn(2, 9, 3)), r"expected an input with \(8,\) in dimension 1"),
        (lambda: ILMNorm(8, standardization=token())(torch.randn(8, 9)), "in its last dimensions"),
    ],
)
def test_errors_say_what_was_expected(make_it: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_it()


def test_groups_by_default_are_the_nearest_to_32_with_several_channels_each() -> None:
    assert [ILMNorm(channels).num_groups for channels in (64, 128, 32, 40)] == [32, 32, 16, 20]


def test_prints_on_one_line() -> None:
    layer = ILMNorm((8, 2), 1, standardization=token(eps=1e-6), mode="paper", gains=True, bias=False)
    assert repr(layer) == (
        "ILMNorm((8, 2), num_groups=1, num_key_groups=1, hidden_features=2, eps=1e-06, layout=token, unbiased=False, "
        "bias=False, gains=True, mode=paper)"
    )


@pytest.mark.parametrize("case", CASES)
def test_empty_batch_and_meta_device(case: str) -> None:
    layer = make(case)
    empty = torch.empty(0, *CASES[case][0][1:])
    assert layer(empty).shape == empty.shape
    meta = layer.to("meta")(torch.empty(CASES[case][0], device="meta"))
    assert meta.shape == CASES[case][0]


@pytest.mark.parametrize("case", ["group 2d", "token", "position", "rms token"])
def test_compiles_without_graph_breaks_and_with_dynamic_batch(case: str) -> None:
    layer = make(case)
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
    for batch in (2, 3, 5):
        x = torch.randn(batch, *CASES[case][0][1:])
        assert relative(layer(x), compiled(x)) < 1e-5


def test_may_be_called_by_keyword() -> None:
    x = torch.randn(2, 8, 3)
    layer = ILMNorm(8, 2)
    assert torch.equal(layer(input=x), layer(x))


def test_integers_are_refused_as_torch_does() -> None:
    with pytest.raises(ValueError, match="floating-point input, got torch.int64"):
        ILMNorm(8, 2)(torch.ones(2, 8, 3, 3, dtype=torch.long))
