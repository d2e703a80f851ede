"""A checkpoint in the paper's authors' format, loaded onto a torchvision ResNet converted in mode ``paper``."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torchvision
from torch import Tensor, nn

import ilmconvert
from ilmconvert.checkpoint import load_authors
from ilmconvert.errors import CheckpointError
from ilmconvert.nn import ILMNorm


def authors_format(model: nn.Module) -> dict[str, Tensor]:
    """Their names for a model of ours, as their DataParallel checkpoints have them."""
    layers = {name for name, m in model.named_modules() if isinstance(m, ILMNorm)}
    state: dict[str, Tensor] = {}
    for key, value in model.state_dict().items():
        prefix = next((name for name in layers if key.startswith(f"{name}.")), None)
        if prefix is None:
            state[f"module.{key}"] = value
            continue
        name, base = key.removeprefix(f"{prefix}."), f"module.{prefix}."
        if name in ("weight", "bias"):
            shift = 0.5 if name == "weight" else 0.0
            state[f"{base}{name}_bias"] = (value - shift).reshape(1, -1, 1, 1)
        elif name == "predictor.encoder.weight":
            for theirs in ("fc_embed.0.weight", "fc_weight.0.0.weight", "fc_bias.0.0.weight"):
                state[base + theirs] = value
        else:
            state[base + {"predictor.scale_decoder.weight": "fc_weight.1.weight"}.get(name, "fc_bias.1.weight")] = value
    return state


@pytest.fixture
def resnet() -> nn.Module:
    model = ilmconvert.convert(torchvision.models.resnet18(), bn_to="group", mode="paper").model.eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.05)
    return model


@pytest.mark.parametrize("wrapped", [True, False])
def test_loads_strictly_with_prefix(resnet: nn.Module, tmp_path: Path, wrapped: bool) -> None:
    state = authors_format(resnet)
    torch.save({"state_dict": state, "epoch": 90} if wrapped else state, tmp_path / "checkpoint.pth")
    fresh = ilmconvert.convert(torchvision.models.resnet18(), bn_to="group", mode="paper").model.eval()
    load_authors(tmp_path / "checkpoint.pth", fresh)
    x = torch.randn(2, 3, 64, 64)
    assert torch.allclose(fresh(x), resnet(x), atol=1e-5)
    assert len(state) == 2 * 20 + 5 * 20 + 22  # B terms, predictor tensors, convolutions and classifier


def test_a_batch_norm_that_is_left_needs_no_counter(tmp_path: Path) -> None:
    """Files of their PyTorch 1.0 have none."""
    model = nn.Sequential(nn.Conv2d(3, 16, 1), nn.GroupNorm(2, 16), nn.BatchNorm2d(16))
    model = ilmconvert.convert(model, mode="paper", exclude="2").model
    state = authors_format(model)
    del state["module.2.num_batches_tracked"]
    torch.save(state, tmp_path / "checkpoint.pth")
    expected = model[2].weight.detach().clone()
    nn.init.normal_(model[2].weight)
    load_authors(tmp_path / "checkpoint.pth", model)
    assert torch.equal(model[2].weight, expected)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda s: s.pop("module.bn1.fc_weight.1.weight"), "missing: bn1.predictor.scale_decoder.weight"),
        (lambda s: s.update({"module.extra": torch.ones(1)}), "unexpected: extra"),
        (lambda s: s.update({"module.bn1.bias_bias": torch.ones(1, 3, 1, 1)}), "of another shape: bn1.bias"),
        (lambda s: s.update({"module.bn1.fc_bias.0.0.weight": torch.ones(2, 4)}), "to equal the encoder it shares"),
    ],
)
def test_what_does_not_fit_is_named(resnet: nn.Module, tmp_path: Path, edit: object, message: str) -> None:
    state = authors_format(resnet)
    edit(state)
    torch.save(state, tmp_path / "checkpoint.pth")
    before = {k: v.clone() for k, v in resnet.state_dict().items()}
    with pytest.raises(CheckpointError, match=message):
        load_authors(tmp_path / "checkpoint.pth", resnet)
    assert all(torch.equal(v, before[k]) for k, v in resnet.state_dict().items())  # nothing half loaded


def test_other_modes_are_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1)}, tmp_path / "checkpoint.pth")
    with pytest.raises(CheckpointError, match="expected a model converted in mode 'paper'"):
        load_authors(tmp_path / "checkpoint.pth", ilmconvert.convert(torchvision.models.resnet18()).model)
