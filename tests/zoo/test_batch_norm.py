"""Real models with Batch Norm: every norm converted, activations kept, finite at batch 1 and 2 in both modes."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

import ilmconvert
from ilmconvert.nn import ILMNorm, ILMNormAct
from tests.helpers import all_finite, randomize_norms

MODELS = {
    "resnet50": 128,
    "efficientnet_b0": 128,
    "mobilenetv3_small_100": 128,
    "regnety_002": 128,
    "densenet121": 128,
    "levit_128s": 224,
    "mobilevit_s": 128,
    "tiny_vit_5m_224": 224,
    "repvit_m0_9": 128,
    "inception_v3": 160,
}


def batch_norms(model: nn.Module) -> int:
    return sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())


@pytest.mark.parametrize("name", MODELS)
def test_every_norm_is_converted_and_trains(name: str) -> None:
    model = randomize_norms(timm.create_model(name))
    conversion = ilmconvert.convert(model)
    converted = conversion.model
    from_batch = [d for d in conversion.report.converted if d.site.family == "batch"]
    assert len(from_batch) == batch_norms(model) > 0
    assert batch_norms(converted) == 0
    assert not conversion.report.skipped
    assert sum(isinstance(m, ILMNorm) for m in converted.modules()) == len(conversion.report.converted)

    size = MODELS[name]
    for batch in (1, 2):
        x = torch.randn(batch, 3, size, size)
        for training in (False, True):
            converted.train(training).zero_grad(set_to_none=True)
            y = converted(x)
            outputs = y if isinstance(y, tuple) else (y,)
            sum(t.square().mean() for t in outputs).backward()
            gradients = [p.grad for p in converted.parameters()]
            assert all_finite((*outputs, *gradients)), (batch, training)
            assert sum(g is not None for g in gradients) >= len(from_batch)


@pytest.mark.parametrize(
    "name", ["efficientnet_b0", "mobilenetv3_small_100", "regnety_002", "mobilevit_s", "inception_v3"]
)
def test_activations_are_kept_numerically(name: str) -> None:
    """At every fused site the output is the original's own activation of the layer's plain output."""
    model = timm.create_model(name).eval()
    converted = ilmconvert.convert(model).model.eval()
    compared = []

    def compare(path: str) -> object:
        act = model.get_submodule(path).act

        def hook(layer: ILMNormAct, args: tuple, output: torch.Tensor) -> None:
            plain = ILMNorm.forward(layer, args[0])
            compared.append((torch.equal(output, act(plain.clone())), torch.equal(output, plain), type(act)))

        return hook

    for path, layer in converted.named_modules():
        if isinstance(layer, ILMNormAct):
            layer.register_forward_hook(compare(path))
    with torch.no_grad():
        converted(torch.randn(1, 3, 160, 160))
    assert all(equal for equal, _, _ in compared)
    active = [(same, kind) for _, same, kind in compared if kind is not nn.Identity]
    assert active
    assert not any(same for same, _ in active)
