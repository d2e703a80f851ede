"""What every registered norm class must keep when it is converted. A class without a case here fails the first test."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial

import pytest
import timm.layers as tl
import timm.models.metaformer as metaformer
import torch
import torch.nn.functional as F
import torchvision
from segmentation_models_pytorch.decoders.upernet.decoder import LayerNorm2d as UpernetLayerNorm2d
from timm.layers.grn import GlobalResponseNorm
from timm.layers.norm import LayerNormExp2d, RmsNorm2dFp32, SimpleNorm2dFp32, SimpleNormFp32
from timm.layers.norm_act import (
    FrozenBatchNormAct2d,
    LayerNormAct2dFp32,
    LayerNormActFp32,
    RmsNormAct,
    RmsNormAct2d,
    RmsNormAct2dFp32,
    RmsNormActFp32,
    SyncBatchNormAct,
)
from torch import Tensor, nn
from torchvision.models.convnext import LayerNorm2d as TorchvisionLayerNorm2d

from ilmconvert.nn import ILMNorm, ILMNormAct
from ilmconvert.norms import Entry, Refusal, build_ilm, entries, find
from ilmconvert.norms.build import Target
from tests.helpers import randomize_norms, relative

ELSEWHERE = ("tests.", "transformers.", "__main__.")  # of other tests, of test_huggingface.py, of the docs
C = 24
TOKENS, IMAGE, VOLUME, SEQUENCE = (3, 5, C), (2, C, 6, 5), (2, C, 3, 4, 2), (2, C, 7)
GELU = {"act_layer": nn.GELU, "inplace": False}


def sync_act(**_: object) -> nn.Module:
    """As timm's own convert_sync_batchnorm makes it."""
    return tl.convert_sync_batchnorm(tl.BatchNormAct2d(C, act_layer=nn.SiLU))


class AnyRankBatchNorm(nn.modules.batchnorm._BatchNorm):
    """As libraries write it that take inputs of any rank."""

    def _check_input_dim(self, input: torch.Tensor) -> None:  # noqa: A002
        pass


CASES: list[tuple[Callable[..., nn.Module], tuple[int, ...]]] = [
    (partial(nn.GroupNorm, 4, C), IMAGE),
    (partial(nn.GroupNorm, 4, C, affine=False), SEQUENCE),
    (partial(tl.GroupNorm, C, 6), IMAGE),
    (partial(tl.GroupNorm1, C), IMAGE),
    (partial(metaformer.GroupNorm1NoBias, C), IMAGE),
    (partial(tl.GroupNormAct, C, 8, **GELU), IMAGE),
    (partial(tl.GroupNorm1Act, C, **GELU), IMAGE),
    (partial(nn.LayerNorm, C), TOKENS),
    (partial(nn.LayerNorm, C, bias=False, eps=1e-3), TOKENS),
    (partial(nn.LayerNorm, C, elementwise_affine=False), TOKENS),
    (partial(nn.LayerNorm, (C, 6, 5)), IMAGE),
    (partial(tl.LayerNorm, C), TOKENS),
    (partial(tl.LayerNormFp32, C), TOKENS),
    (partial(metaformer.LayerNormNoBias, C), TOKENS),
    (partial(tl.LayerNormAct, C, **GELU), TOKENS),
    (partial(LayerNormActFp32, C, **GELU), TOKENS),
    (partial(tl.LayerNorm2d, C), IMAGE),
    (partial(tl.LayerNorm2d, C, affine=False), IMAGE),
    (partial(tl.LayerNorm2dFp32, C), IMAGE),
    (partial(LayerNormExp2d, C), IMAGE),
    (partial(metaformer.LayerNorm2dNoBias, C), IMAGE),
    (partial(TorchvisionLayerNorm2d, C), IMAGE),
    (partial(UpernetLayerNorm2d, C), IMAGE),
    (partial(tl.LayerNormAct2d, C, **GELU), IMAGE),
    (partial(LayerNormAct2dFp32, C, **GELU), IMAGE),
    (partial(nn.RMSNorm, C), TOKENS),
    (partial(nn.RMSNorm, C, elementwise_affine=False), TOKENS),
    (partial(tl.RmsNorm, C), TOKENS),
    (partial(tl.RmsNormFp32, C), TOKENS),
    (partial(RmsNormAct, C, **GELU), TOKENS),
    (partial(RmsNormActFp32, C, **GELU), TOKENS),
    (partial(tl.RmsNorm2d, C), IMAGE),
    (partial(RmsNorm2dFp32, C), IMAGE),
    (partial(RmsNormAct2d, C, **GELU), IMAGE),
    (partial(RmsNormAct2dFp32, C, **GELU), IMAGE),
    (partial(tl.SimpleNorm, C), TOKENS),
    (partial(SimpleNormFp32, C), TOKENS),
    (partial(tl.SimpleNorm2d, C), IMAGE),
    (partial(SimpleNorm2dFp32, C), IMAGE),
    (partial(nn.InstanceNorm1d, C, affine=True), SEQUENCE),
    (partial(nn.InstanceNorm2d, C), IMAGE),
    (partial(nn.InstanceNorm3d, C, affine=True), VOLUME),
    (partial(nn.InstanceNorm2d, C, affine=True, track_running_stats=True), IMAGE),
    (partial(nn.BatchNorm1d, C), SEQUENCE),
    (partial(nn.BatchNorm1d, C), (4, C)),
    (partial(nn.BatchNorm2d, C), IMAGE),
    (partial(nn.BatchNorm2d, C, affine=False), IMAGE),
    (partial(nn.BatchNorm2d, C, track_running_stats=False), IMAGE),
    (partial(nn.BatchNorm3d, C), VOLUME),
    (partial(nn.SyncBatchNorm, C), IMAGE),
    (partial(AnyRankBatchNorm, C), IMAGE),
    (partial(torchvision.ops.FrozenBatchNorm2d, C), IMAGE),
    (partial(tl.BatchNormAct2d, C, act_layer=nn.SiLU, drop_layer=partial(nn.Dropout, 0.3)), IMAGE),
    (partial(FrozenBatchNormAct2d, C, act_layer=nn.SiLU), IMAGE),
    (sync_act, IMAGE),
]


def make(index: int, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, ILMNorm, torch.Tensor]:
    """A norm with random parameters, the layer built from it, and an input."""
    torch.manual_seed(index)
    build, shape = CASES[index]
    norm = randomize_norms(build()).to(dtype).eval()
    entry = find(norm)
    assert isinstance(entry, Entry)
    spec = entry.handler.describe(norm)
    layer = build_ilm(norm, entry.handler, Target(spec.num_groups or 1, 2, 2))
    return norm, layer, torch.randn(shape).mul(2).add(0.5).to(dtype)


def label(index: int) -> str:
    norm = CASES[index][0]()
    return f"{type(norm).__name__}-{index}"


every = pytest.mark.parametrize("index", range(len(CASES)), ids=label)


def test_every_registered_class_has_a_case() -> None:
    convertible = {name for name, entry in entries() if isinstance(entry, Entry) and not name.startswith(ELSEWHERE)}
    covered = {find(build()).name for build, _ in CASES}
    assert covered == {name for name in convertible if "ilmconvert.norms.registry" not in name}


@pytest.mark.parametrize("name", [name for name, _ in entries() if not name.startswith(ELSEWHERE)])
def test_registered_classes_exist(name: str) -> None:
    if "registry" in name:
        pytest.skip("registered by a doctest")
    module, _, cls = name.rpartition(".")
    assert issubclass(getattr(importlib.import_module(module), cls), nn.Module)


@every
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)], ids=str)
def test_output_is_preserved(index: int, dtype: torch.dtype, tolerance: float) -> None:
    norm, layer, x = make(index, dtype)
    y, base = layer(x), norm(x) if norm.__class__ is not nn.SyncBatchNorm else None
    assert torch.isfinite(y).all()
    assert y.dtype == dtype
    if "Fp32" in type(norm).__name__:  # these round to float32 themselves
        tolerance = 1e-5
    if find(norm).handler.describe(norm).preserves:
        assert relative(base, y) < tolerance
        if x.ndim == 4:
            last = x.to(memory_format=torch.channels_last)
            assert relative(norm(last), layer(last)) < tolerance


@every
@pytest.mark.filterwarnings("ignore:Mismatch dtype")  # torch's rms_norm tells that it is slow here
def test_half_precision_returns_the_norms_dtype(index: int) -> None:
    norm, layer, x = make(index)
    preserves = find(norm).handler.describe(norm).preserves
    x = x.bfloat16()
    mixed = norm(x)
    assert layer(x).dtype == mixed.dtype
    assert not preserves or relative(mixed, layer(x)) < 2e-2
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x.float()).dtype == norm(x.float()).dtype
    half, half_layer = norm.bfloat16(), layer.bfloat16()
    assert half_layer(x).dtype == half(x).dtype
    assert not preserves or relative(half(x), half_layer(x)) < 3e-2


@every
def test_everything_else_is_carried_over(index: int) -> None:
    norm, layer, x = make(index)
    spec = find(norm).handler.describe(norm)
    assert type(layer) is (ILMNormAct if spec.has_act else ILMNorm)
    assert (layer.weight is not None, layer.bias is not None) == (spec.weight, spec.bias)
    assert layer.eps == norm.eps
    assert not layer.training
    if spec.has_act:  # numerically: the activation's own output on what the plain layer computes
        plain = ILMNorm.forward(layer, x)
        assert torch.equal(layer(x), norm.act(plain.clone()))
        assert not torch.equal(layer(x), plain)
        assert layer.train().drop.training


@pytest.mark.parametrize("drops", [True, False])
def test_a_fused_activation_comes_after_the_dropout_and_both_keep_their_modes(drops: bool) -> None:
    norm = tl.GroupNormAct(8, 2, act_layer=nn.Sigmoid, drop_layer=partial(nn.Dropout, 0.5)).train()
    norm.drop.train(drops)
    layer = build_ilm(norm, find(norm).handler, Target(2, 1, 2))
    assert (layer.training, layer.drop.training) == (True, drops)
    x = torch.randn(2, 8, 4, 4)
    outputs = []
    for module in (norm, layer):
        torch.manual_seed(1)
        outputs.append(module(x))
    assert relative(*outputs) < 1e-5
    assert bool((outputs[0] == 0.5).any()) is drops


@every
@pytest.mark.parametrize("trains", [True, False])
def test_frozen_stays_frozen(index: int, trains: bool) -> None:
    norm = CASES[index][0]().requires_grad_(trains)
    entry = find(norm)
    layer = build_ilm(norm, entry.handler, Target(entry.handler.describe(norm).num_groups or 1, 2, 2))
    tensors = [t for t in (getattr(norm, "weight", None), getattr(norm, "bias", None)) if t is not None]
    expected = any(t.requires_grad for t in tensors) if tensors else True
    assert {p.requires_grad for p in layer.parameters()} == {expected}


def test_hooks_move_along() -> None:
    norm, seen = nn.GroupNorm(2, 8), []
    norm.register_forward_hook(lambda module, args, output: seen.append(type(module).__name__))
    norm.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    entry = find(norm)
    layer = build_ilm(norm, entry.handler, Target(2, 1, 2))
    x = torch.randn(2, 8, 3)
    assert relative(norm(x), layer(x)) < 1e-5
    assert seen == ["GroupNorm", "ILMNorm"]


@pytest.mark.parametrize(
    ("module", "code"),
    [
        (tl.EvoNorm2dS0(16), "fused-nonlinearity"),
        (tl.FilterResponseNormTlu2d(16), "fused-nonlinearity"),
        (GlobalResponseNorm(16), "not-a-standardization"),
        (tl.SplitBatchNorm2d(16), "split-statistics"),
        (nn.LocalResponseNorm(2), "not-a-standardization"),
        (type("MyBatchNorm", (nn.BatchNorm2d,), {"forward": lambda self, x: x})(4), "custom-forward"),
        (type("SomeNorm", (nn.Module,), {})(), "unknown-norm"),
        (nn.utils.parametrizations.weight_norm(nn.BatchNorm2d(4), dim=None), "parametrized"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_refusals_carry_a_reason(module: nn.Module, code: str) -> None:
    refusal = find(module)
    assert isinstance(refusal, Refusal)
    assert refusal.code == code
    assert len(refusal.reason.split()) > 4


@pytest.mark.parametrize("module", [nn.Linear(2, 2), nn.Sequential(nn.BatchNorm2d(2)), tl.NormMlpClassifierHead(8, 2)])
def test_other_modules_are_no_norms(module: nn.Module) -> None:
    assert find(module) is None


def test_subclass_that_keeps_forward_is_its_base() -> None:
    custom = type("Renamed", (nn.GroupNorm,), {})(2, 4)
    assert find(custom).handler.family == "group"


def test_sync_batch_norm_act_keeps_its_activation() -> None:
    assert isinstance(sync_act(), SyncBatchNormAct)


def test_a_layer_with_a_matrix_is_no_norm_whatever_its_name() -> None:
    class NormedLinear(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(F.normalize(x), F.normalize(self.weight))

    class ScaleNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(8, 6, 5))

    assert find(NormedLinear(4, 4)) is None
    assert find(ScaleNorm()).code == "unknown-norm"
