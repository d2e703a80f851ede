"""A fingerprint tells training, and nothing else."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import nn

import ilmconvert
from ilmconvert.errors import ModelError
from ilmconvert.fingerprint import fingerprint
from ilmconvert.nn import ILMNorm
from tests.helpers import same_state


def test_one_step_of_training_is_seen_anywhere() -> None:
    model = timm.create_model("test_resnet")
    before = fingerprint(model)
    assert fingerprint(copy.deepcopy(model).train()) == before
    for name, parameter in model.named_parameters():
        other = copy.deepcopy(model)
        with torch.no_grad():
            other.get_parameter(name).mul_(1 + 1e-5).add_(1e-7)
        assert fingerprint(other) != before, name
        assert parameter.requires_grad
    with torch.no_grad():
        model.bn1.running_mean += 1e-6
    assert fingerprint(model) != before


def test_models_without_values_have_none() -> None:
    with torch.device("meta"):
        assert fingerprint(nn.Linear(2, 2)) is None


def test_the_original_is_given_back_only_while_it_is_one(tmp_path) -> None:
    model = timm.create_model("test_resnet", num_classes=4)
    conversion = ilmconvert.convert(model)
    with torch.no_grad():
        for layer in conversion.model.modules():
            if isinstance(layer, ILMNorm):
                for parameter in layer.parameters():
                    parameter += 0.1
    loaded = ilmconvert.load_conversion(conversion.save(tmp_path / "calibrated"))
    for kept in (conversion, loaded):
        assert same_state(kept.original(), model)
    with torch.no_grad():
        conversion.model.fc.bias += 1e-3
    loaded = ilmconvert.load_conversion(conversion.save(tmp_path / "trained"))
    for trained in (conversion, loaded):
        with pytest.raises(ModelError, match="the other weights are not the original's. Give the original itself"):
            trained.original()
    conversion.model.reset_classifier(7)
    with pytest.raises(ModelError, match="Give the original itself"):
        conversion.original()
