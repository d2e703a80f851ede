"""What stands around a norm: code that reads it, containers that hold it too, modules that make use of it."""

from __future__ import annotations

import os
from collections import deque, namedtuple
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import ilmconvert
from ilmconvert.errors import ModelError
from ilmconvert.nn import ILMNorm
from tests.helpers import relative

Named = namedtuple("Named", "norm name")


class Held(nn.Module):
    """Norms that are registered, and called through a list, tuples in a dict, a partial and a bound method."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.GroupNorm(1, 4), nn.GroupNorm(2, 4)
        self.third, self.fourth = nn.GroupNorm(4, 4), nn.GroupNorm(1, 4)
        self.norms, self.table = [self.first], {"late": (self.second,), "named": Named(self.first, "a")}
        self.partial, self.method = partial(self.third), self.fourth.forward

    def forward(self, x: Tensor) -> Tensor:
        return self.method(self.partial(self.table["late"][0](self.norms[0](x))))  # type: ignore[no-any-return]


@dataclass
class Stage:
    norm: nn.Module
    scale: float = 2.0


class HeldByObjects(nn.Module):
    """A norm that is registered, and called through an object."""

    def __init__(self, hold: Any, get: Any) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(2, 4)
        self.held, self.get = hold(self.norm), get

    def forward(self, x: Tensor) -> Tensor:
        return self.get(self.held)(x)  # type: ignore[no-any-return]


class Reading(nn.Module):
    """Its subclasses read attributes of the norm."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(8)


class ReadsWeight(Reading):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.bn(x)
        return y if y.abs().max() > 1e9 else y / self._size()

    def _size(self) -> Tensor:
        return self.bn.weight.abs().mean()


class ReadsStatistics(Reading):
    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.bn.running_mean.mul_(0.9)  # type: ignore[union-attr]
        return self.bn(x)  # type: ignore[no-any-return]


class ReadsInALoop(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.ModuleList([nn.BatchNorm1d(8)])
        self.bn[0].gate = 2.0

    def forward(self, x: Tensor) -> Tensor:
        for norm in self.bn:
            x = norm(x) * norm.gate
        return x


class AsksForTheClass(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.ModuleList([nn.Linear(8, 8), nn.BatchNorm1d(8)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.bn:
            x = x + layer(x) if isinstance(layer, (nn.BatchNorm1d, nn.GroupNorm)) else layer(x)
        return x


class ReadsWidth(Reading):
    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] != self.bn.num_features or not self.bn.affine:
            raise ValueError
        return self.bn(x.to(self.bn.weight.dtype))  # type: ignore[no-any-return]


class Tagged(nn.BatchNorm2d):
    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.importance = nn.Parameter(torch.ones(channels))


def test_a_norm_held_in_plain_containers_too_is_replaced_there() -> None:
    model, x = Held(), torch.randn(2, 4, 5)
    conversion = ilmconvert.convert(model, example_inputs=x)
    converted = conversion.model
    assert converted.norms[0] is converted.first
    assert converted.table["late"][0] is converted.second
    assert converted.table["named"].norm is converted.first
    assert converted.partial.func is converted.third
    assert converted.method.__self__ is converted.fourth
    assert sum(isinstance(m, ILMNorm) for m in converted.children()) == 4
    assert ilmconvert.verify(model, converted, x).passed
    assert relative(converted(x), model(x)) < 1e-6
    reverted = conversion.revert()
    assert reverted.norms[0] is reverted.first
    assert reverted.partial.func is reverted.third
    assert reverted.method.__self__ is reverted.fourth
    assert all(isinstance(m, nn.GroupNorm) for m in reverted.children())
    assert model.table["late"][0] is model.second
    assert isinstance(model.second, nn.GroupNorm)


@pytest.mark.parametrize(
    ("hold", "get"),
    [
        (Stage, lambda held: held.norm),
        (lambda norm: SimpleNamespace(stages=[Stage(norm)]), lambda held: held.stages[0].norm),
        (lambda norm: deque([norm], maxlen=3), lambda held: held[0]),
        (lambda norm: {norm}, lambda held: next(iter(held))),
    ],
    ids=["dataclass", "namespace", "deque", "set"],
)
def test_a_norm_held_by_objects_too_is_replaced_there(hold: Any, get: Any) -> None:
    model = HeldByObjects(hold, get)
    conversion = ilmconvert.convert(model, example_inputs=torch.randn(2, 4, 5))
    assert get(conversion.model.held) is conversion.model.norm
    assert isinstance(conversion.model.norm, ILMNorm)
    reverted = conversion.revert()
    assert get(reverted.held) is reverted.norm
    assert get(model.held) is model.norm


def test_a_norm_that_only_an_object_holds_is_reported() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    model.stage = SimpleNamespace(norms=deque([nn.LayerNorm(4)]))
    (decision,) = ilmconvert.inspect(model).skipped
    assert (decision.path, decision.code) == ("stage.norms[0]", "unregistered")


class Caching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.cache = nn.LayerNorm(8), {}

    def forward(self, x: Tensor) -> Tensor:
        if x.shape not in self.cache:
            self.cache[x.shape] = torch.zeros(8)
        return self.norm(x) + self.cache[x.shape]  # type: ignore[no-any-return]


def test_a_cache_by_shape_is_no_obstacle() -> None:
    model, x = Caching(), torch.randn(2, 8)
    assert torch.equal(ilmconvert.convert(model, example_inputs=x).model(x), model(x))


@pytest.mark.parametrize("kind", [ReadsWeight, ReadsStatistics, ReadsInALoop, AsksForTheClass])
def test_a_norm_whose_attributes_or_class_are_asked_for_is_left(kind: type[nn.Module]) -> None:
    report = ilmconvert.inspect(kind().eval(), example_inputs=torch.randn(4, 8))
    assert [(d.path.partition(".")[0], d.code) for d in report.skipped] == [("bn", "parameters-read")]


def test_attributes_that_the_layer_has_too_are_no_obstacle() -> None:
    model, x = ReadsWidth().eval(), torch.randn(4, 8)
    assert relative(ilmconvert.convert(model, example_inputs=x).model(x), model(x)) < 1e-4


def test_a_class_with_tensors_of_its_own_is_left() -> None:
    report = ilmconvert.inspect(nn.Sequential(nn.Conv2d(3, 8, 1), Tagged(8), nn.BatchNorm2d(8)))
    assert [(d.path, d.code) for d in report.skipped] == [("1", "own-tensors")]
    assert "importance" in (report.skipped[0].reason or "")


class Called(nn.LayerNorm):
    def __call__(self, x: Tensor, scale: float = 1.0) -> Tensor:  # type: ignore[override]
        return super().__call__(x) * scale  # type: ignore[no-any-return]


class Predicting(nn.LayerNorm):
    """Its scale is predicted by a module of its own."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, elementwise_affine=False)
        self.predict = nn.Linear(1, channels, bias=False)

    weight = property(lambda self: self.predict.weight[:, 0], lambda self, value: None)


class OldNames(nn.LayerNorm):
    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *rest: Any) -> None:  # type: ignore[override]
        state[f"{prefix}weight"] = state.pop(f"{prefix}gamma")
        super()._load_from_state_dict(state, prefix, *rest)


def hooked() -> nn.Module:
    norm = nn.LayerNorm(8)
    norm.register_load_state_dict_pre_hook(lambda *_: None)
    return norm


@pytest.mark.parametrize(
    ("norm", "code"),
    [
        (Called(8), "custom-forward"),
        (Predicting(8), "own-tensors"),
        (OldNames(8), "custom-state-dict"),
        (hooked(), "custom-state-dict"),
    ],
    ids=["call", "tensors", "loading", "hook"],
)
def test_a_class_that_computes_more_is_left(norm: nn.Module, code: str) -> None:
    report = ilmconvert.inspect(nn.Sequential(nn.Linear(8, 8), norm), example_inputs=torch.randn(2, 8))
    assert [(d.path, d.code) for d in report.skipped] == [("1", code)]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("exclude", [(), ("layers.0.*",)])
def test_an_encoder_makes_no_nested_tensors_for_converted_layers(exclude: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2).eval()
    conversion = ilmconvert.convert(model, exclude=exclude)
    x, mask = torch.randn(2, 7, 32), torch.arange(7) >= torch.tensor([[7], [4]])
    with torch.no_grad():
        expected, found = (m(x, src_key_padding_mask=mask)[~mask] for m in (model, conversion.model))
    assert relative(found, expected) < 1e-5
    assert (model.use_nested_tensor, conversion.model.use_nested_tensor) == (True, False)
    assert conversion.revert().use_nested_tensor


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_a_converted_model_has_nothing_left_to_convert(name: str) -> None:
    report = ilmconvert.inspect(ilmconvert.convert(timm.create_model(name)).model)
    assert report.plan.decisions == ()


def test_a_model_wrapped_for_several_processes_is_refused(tmp_path: os.PathLike[str]) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8)))
        with pytest.raises(ModelError, match=r"convert its \.module"):
            ilmconvert.convert(wrapped)
    finally:
        torch.distributed.destroy_process_group()


def test_converting_in_place_keeps_handles_and_storages() -> None:
    model, seen = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8)), []
    handle = model[1].register_forward_hook(lambda *_: seen.append(1))
    ilmconvert.convert_(model)
    model(torch.randn(2, 4))
    handle.remove()
    model(torch.randn(2, 4))
    assert seen == [1]
    model[0].bias.data.resize_(16)  # as quantization-aware training does


@pytest.mark.filterwarnings("ignore:.*deprecated")
def test_what_changes_every_linear_leaves_the_predictors_alone() -> None:
    model = timm.create_model("test_vit", num_classes=10).eval()
    converted = ilmconvert.convert(model).model
    x = torch.randn(2, 3, 160, 160)
    quantized = [torch.ao.quantization.quantize_dynamic(m, {nn.Linear}, torch.qint8) for m in (model, converted)]
    assert relative(quantized[0](x), quantized[1](x)) < 1e-5
    for module in converted.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight)
    assert all(
        not layer.predictor.scale_decoder.weight.any() for layer in converted.modules() if isinstance(layer, ILMNorm)
    )


def test_a_norm_run_by_its_bound_method_is_no_idle_one() -> None:
    class Bound(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(8)
            self.call = self.norm.forward

        def forward(self, x: Tensor) -> Tensor:
            return self.call(x)

    x = torch.randn(3, 8)
    conversion = ilmconvert.convert(Bound(), example_inputs=x)
    assert conversion.report.warnings == ()
    nn.init.constant_(conversion.model.norm.bias, 2.0)
    assert torch.allclose(conversion.model(x), nn.functional.layer_norm(x, (8,)) + 2, atol=1e-6)


@pytest.mark.filterwarnings("ignore")  # the exporters' own
@pytest.mark.parametrize(
    ("name", "dynamo"),
    [
        *(pytest.param(name, True, marks=pytest.mark.slow) for name in ("test_resnet", "test_vit", "test_convnext")),
        ("test_resnet", False),
        ("test_vit", False),
        ("test_convnext", False),
    ],
)
def test_onnx_gives_the_same(name: str, dynamo: bool, tmp_path: Path) -> None:
    """The layouts of samples, tokens and positions, in onnxruntime."""
    onnxruntime = pytest.importorskip("onnxruntime")
    model = ilmconvert.convert(timm.create_model(name)).model.eval()
    for layer in (m for m in model.modules() if isinstance(m, ILMNorm)):
        nn.init.normal_(layer.predictor.shift_decoder.weight, std=0.1)
    x = torch.randn(2, *model.pretrained_cfg["input_size"])
    torch.onnx.export(model, (x,), str(tmp_path / "model.onnx"), dynamo=dynamo)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert relative(model(x).detach(), torch.from_numpy(y)) < 1e-5
