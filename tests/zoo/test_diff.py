"""Every family diffs against its own conversion with exactly the converted sites changed and nothing else."""

from __future__ import annotations

import pytest
import timm
import torch

import ilmconvert

MODELS = (
    "beit_base_patch16_224",
    "cait_xxs24_224",
    "coat_lite_tiny",
    "coatnet_nano_rw_224",
    "convnext_atto",
    "crossvit_tiny_240",
    "davit_tiny",
    "deit_tiny_distilled_patch16_224",
    "densenet121",
    "edgenext_xx_small",
    "efficientformer_l1",
    "efficientnet_b0",
    "eva02_tiny_patch14_224",
    "focalnet_tiny_srf",
    "ghostnet_050",
    "inception_v4",
    "levit_128s",
    "maxvit_nano_rw_256",
    "mixer_s32_224",
    "mobilenetv3_small_050",
    "mobilevit_xxs",
    "nfnet_f0",
    "poolformer_s12",
    "regnety_002",
    "res2net50_14w_8s",
    "resnetv2_50x1_bit",
    "swin_tiny_patch4_window7_224",
    "tiny_vit_5m_224",
    "vit_tiny_patch16_224",
    "volo_d1_224",
    "xcit_nano_12_p8_224",
)


QUICK = ("convnext_atto", "efficientnet_b0", "regnety_002", "swin_tiny_patch4_window7_224", "vit_tiny_patch16_224")
CASES = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in MODELS]


@pytest.mark.parametrize("name", CASES)
def test_only_the_converted_sites_change(name: str) -> None:
    with torch.device("meta"):
        conversion = ilmconvert.convert(timm.create_model(name))
    diff = conversion.diff()
    sites = {d.path: d.site.paths for d in conversion.report.converted}
    assert {row.path for row in diff.changed} == set(sites)
    for row in diff.changed:
        before, after = diff.nodes(row)
        assert row.before == row.after
        assert row.changes == ("changed",)
        assert (before.role, after.role) == ("norm", "ilm")
        assert {before.path, *before.aliases} == set(sites[row.path])
        assert any(k.endswith("predictor.encoder.weight") for k in row.keys_added)
    assert diff.before.run_error == diff.after.run_error == ""
    for graph, model in ((diff.before, conversion.revert()), (diff.after, conversion.model)):
        assert sorted(k for node in graph.nodes for k in node.state_keys()) == sorted(model.state_dict())
    totals = diff.before.totals, diff.after.totals
    assert totals[1].parameters - totals[0].parameters == conversion.report.added_parameters
    assert diff.after.totals.macs >= diff.before.totals.macs > 0
