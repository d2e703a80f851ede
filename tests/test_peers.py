"""Where the field's other tools fail (measured, see docs/design.md): each failure is a test that this one passes."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

import ilmconvert
from ilmconvert.nn import ILMNorm
from tests.helpers import randomize_norms, relative
from tests.models import Failing, TiedNorm


@pytest.mark.parametrize(
    "name", ["efficientnet_b0", "mobilenetv3_large_100", "regnety_002", "densenet121", "resnetv2_50"]
)
def test_fused_batch_norms_are_replaced(name: str) -> None:
    """opacus' ModuleValidator.fix replaces none of these and calls the model valid."""
    model = timm.create_model(name)
    norms = sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
    converted = ilmconvert.convert(model).model
    assert sum(isinstance(m, ILMNorm) for m in converted.modules()) == norms > 0
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in converted.modules())


def test_everything_the_norm_had_is_kept() -> None:
    """opacus drops scale, shift, eps, requires_grad, training mode and dtype."""
    norm = randomize_norms(nn.BatchNorm2d(16, eps=3e-4)).double().eval()
    norm.weight.requires_grad_(False)
    layer = ilmconvert.convert(nn.Sequential(nn.Conv2d(3, 16, 1).double(), norm)).model[1]
    assert (layer.eps, layer.training, layer.weight.dtype) == (3e-4, False, torch.float64)
    assert (layer.weight.requires_grad, layer.bias.requires_grad) == (False, True)
    assert layer.weight.std() > 0
    assert layer.bias.std() > 0


def test_norm_under_two_names_is_replaced_under_both() -> None:
    """opacus replaces half of it."""
    converted = ilmconvert.convert(TiedNorm()).model
    assert converted.norm1 is converted.block[1]
    assert isinstance(converted.norm1, ILMNorm)


def test_no_group_holds_a_single_value() -> None:
    """opacus turns BatchNorm1d(4) into groups of one value, whose output is about zero."""
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    converted = ilmconvert.convert(model, bn_to="group").model
    assert converted[1].num_groups == 2
    assert converted(torch.randn(8, 4)).std() > 0.5


@pytest.mark.parametrize("layer", ["groupnorm", "layernorm2d"])
def test_activation_is_kept_and_2d_layer_norm_works(layer: str) -> None:
    """Composer's surgery loses GroupNormAct's activation and crashes on LayerNorm2d."""
    name = {"groupnorm": "resnetv2_50x1_bit", "layernorm2d": "convnext_atto"}[layer]
    model = randomize_norms(timm.create_model(name)).eval()
    x = torch.randn(1, 3, 96, 96)
    assert relative(model(x), ilmconvert.convert(model).model(x)) < 1e-5


def test_batch_norm_activation_is_kept() -> None:
    """torch's convert_sync_batchnorm drops BatchNormAct2d's activation."""
    norm = timm.layers.BatchNormAct2d(8, act_layer=nn.ReLU)
    x = torch.randn(2, 8, 4, 4)
    assert (ilmconvert.convert(norm).model(x) >= 0).all()


def test_more_than_batch_norm_is_converted() -> None:
    """timm's converters know Sync, Split and Frozen BatchNorm alone."""
    model = nn.Sequential(nn.BatchNorm1d(4), nn.GroupNorm(2, 4), nn.InstanceNorm1d(4), nn.LayerNorm(6), nn.RMSNorm(6))
    report = ilmconvert.convert(model, example_inputs=torch.randn(2, 4, 6)).report
    assert [d.site.family for d in report.converted] == ["batch", "group", "instance", "layer", "rms"]


def test_training_flag_is_live_and_class_kept() -> None:
    """torchvision's feature extraction loses the class and bakes the mode in."""
    model = timm.create_model("test_resnet", drop_rate=0.5)
    converted = ilmconvert.convert(model.eval()).model
    assert type(converted) is type(model)
    x = torch.randn(2, 3, 160, 160)
    assert torch.equal(converted(x), converted(x))
    converted.train()
    assert not torch.equal(converted(x), converted(x))  # dropout is on again


def test_a_failed_trace_leaves_modes_alone() -> None:
    """torchvision's create_feature_extractor leaves the model in another mode after a failure."""
    model = Failing().train()
    conversion = ilmconvert.convert(model, example_inputs=torch.randn(2, 8))
    assert all(m.training for m in model.modules())
    assert all(m.training for m in conversion.model.modules())
    assert isinstance(conversion.model.norm, ILMNorm)


def test_subclasses_are_found() -> None:
    """optimum.fx and others match exact types."""
    norm = type("MyNorm", (nn.GroupNorm,), {})(2, 4)
    assert [d.path for d in ilmconvert.convert(nn.Sequential(norm)).report.converted] == ["0"]


def test_frozen_and_affine_free_norms_are_not_filtered_out() -> None:
    """Filters on parameters skip them elsewhere."""
    model = nn.Sequential(nn.GroupNorm(2, 4).requires_grad_(False), nn.BatchNorm1d(4, affine=False))
    assert len(ilmconvert.convert(model).report.converted) == 2


def test_undo_works_in_a_later_session(tmp_path: object) -> None:
    """optimum.fx reverses within one session only."""
    model = randomize_norms(timm.create_model("test_resnet"))
    ilmconvert.convert(model).save(tmp_path / "saved")
    reverted = ilmconvert.load_conversion(tmp_path / "saved").revert()
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), reverted.state_dict().values(), strict=True)
    )
    assert list(model.state_dict()) == list(reverted.state_dict())
