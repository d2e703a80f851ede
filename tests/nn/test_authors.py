"""The authors' layers, as recorded from their release: outputs, parameter and input gradients."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from ilmconvert.checkpoint.authors import translate_authors
from ilmconvert.nn import ILMNorm
from ilmconvert.nn.grouping import bottleneck

FILE = Path(__file__).parents[1] / "fixtures" / "authors_layers.safetensors"
with safe_open(FILE, "pt") as _golden:
    CASES = json.loads(_golden.metadata()["cases"])


def build(case: dict) -> ILMNorm:
    channels, kind = case["channel"], case["kind"]
    groups = {"ilm_gn": case.get("num_groups", 32), "ilm_in": channels, "ilm_ln": 1}[kind]
    keys = channels // case.get("key_group_size", 16)
    hidden = bottleneck(keys, case.get("reduction", 16), mode="paper", grouped=kind == "ilm_gn")
    return ILMNorm(channels, groups, num_key_groups=keys, hidden_features=hidden, mode="paper")


def relative_norm(ours: Tensor, theirs: Tensor) -> float:
    return ((ours.flatten() - theirs.flatten()).norm() / theirs.norm().clamp_min(1e-12)).item()


@pytest.mark.parametrize("name", sorted(CASES))
def test_outputs_and_gradients(name: str) -> None:
    stored = load_file(FILE)
    tensors = {key.removeprefix(f"{name}/"): value for key, value in stored.items() if key.startswith(f"{name}/")}
    layer = build(CASES[name])
    theirs = {key.removeprefix("param/"): value for key, value in tensors.items() if key.startswith("param/")}
    layer.load_state_dict(translate_authors(theirs, {"": layer}))

    x = tensors["x"].requires_grad_()
    y = layer(x)
    y.backward(tensors["grad_y"])

    assert (y - tensors["y"]).abs().max() < 2e-5
    assert relative_norm(x.grad, tensors["grad_x"]) < 2e-4
    gradients = {
        "weight_bias": layer.weight.grad,
        "bias_bias": layer.bias.grad,
        "fc_embed.0.weight": layer.predictor.encoder.weight.grad,
        "fc_weight.1.weight": layer.predictor.scale_decoder.weight.grad,
        "fc_bias.1.weight": layer.predictor.shift_decoder.weight.grad,
    }
    for key, gradient in gradients.items():
        assert relative_norm(gradient, tensors[f"grad/{key}"]) < 2e-4, key


def test_starts_as_the_release_does() -> None:
    layer = ILMNorm(64, 32, mode="paper")
    x = torch.randn(2, 64, 5, 5)
    scale = layer.weight - 0.5
    assert torch.equal(scale, torch.ones(64))  # B_omega = 1, so omega = 1 + sigmoid(...)
    assert torch.equal(layer.bias, torch.zeros(64))
    assert layer.predictor.encoder.weight.shape == (2, 4)
    assert layer(x).std() > 1.2  # not the base norm: omega is about 1.5
