"""Real models whose norms are Group, Layer or RMS norms convert with identical outputs."""

from __future__ import annotations

import pytest
import timm
import torch

import ilmconvert
from tests.helpers import randomize_norms, relative

MODELS = (
    "vit_tiny_patch16_224",  # timm LayerNorm on tokens
    "convnext_atto",  # LayerNorm2d and LayerNorm
    "swin_tiny_patch4_window7_224",  # channels-last LayerNorm
    "resnetv2_50x1_bit",  # GroupNormAct, weight standardization
    "poolformer_s12",  # GroupNorm1
    "convnext_atto_rms",  # RmsNorm2d
    "coatnext_nano_rw_224",  # LayerNormAct2d beside LayerNorm
    "convnext_zepto_rms",  # SimpleNorm2d
    "vit_medium_patch16_rope_reg1_gap_256",  # several norms on one token stream
)


@pytest.mark.parametrize("name", MODELS)
def test_outputs_are_identical(name: str) -> None:
    torch.manual_seed(0)
    model = randomize_norms(timm.create_model(name)).eval()
    conversion = ilmconvert.convert(model)
    converted = conversion.model
    assert conversion.report.exact
    assert {d.code for d in conversion.report.skipped} <= {"weight-standardization"}
    x = torch.randn(1, *model.pretrained_cfg["input_size"])
    with torch.no_grad():
        base = model(x)
        assert relative(base, converted(x)) < 1e-5
        last = x.to(memory_format=torch.channels_last)
        for m in (model, converted):
            m.to(memory_format=torch.channels_last)
        assert relative(model(last), converted(last)) < 1e-5
        assert relative(model.double()(x.double()), converted.double()(x.double())) < 1e-12


@pytest.mark.parametrize("name", ["coatnet_nano_rw_224", "maxvit_nano_rw_256"])
def test_a_mixed_model_is_preserved_where_batch_norm_stays(name: str) -> None:
    """CoAtNet and MaxViT have BatchNorm beside LayerNorm: without converting it, outputs are identical."""
    model = randomize_norms(timm.create_model(name)).eval()
    conversion = ilmconvert.convert(model, skip_norms="batch")
    assert conversion.report.exact
    assert {d.site.family for d in conversion.report.converted} == {"layer"}
    assert {d.code for d in conversion.report.skipped} == {"excluded"}
    x = torch.randn(1, *model.pretrained_cfg["input_size"])
    with torch.no_grad():
        base = model(x)
        assert relative(base, conversion.model(x)) < 1e-5
        assert relative(model.double()(x.double()), conversion.model.double()(x.double())) < 1e-12
