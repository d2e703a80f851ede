"""Methods that fold norms into convolutions raise on converted modules, and work again after an undo."""

from __future__ import annotations

import copy
import pickle
import re
from pathlib import Path

import pytest
import timm
import torch
from timm.utils import reparameterize_model
from torch import nn

import ilmconvert
from ilmconvert.errors import ModelError
from ilmconvert.folding import _METHODS
from tests.helpers import relative


@pytest.mark.parametrize("name", ["repvgg_a0", "efficientvim_m1", "repvit_m1", "shvit_s1"])
def test_reparameterization_is_refused_and_works_after_an_undo(name: str) -> None:
    model = timm.create_model(name).eval()
    conversion = ilmconvert.convert(model)
    with pytest.raises(ModelError, match="expected Batch Norm to fold in"):
        reparameterize_model(conversion.model)
    with pytest.raises(ModelError, match="expected Batch Norm to fold in"):
        reparameterize_model(copy.deepcopy(conversion.model))
    with torch.no_grad():
        x = torch.randn(1, 3, 64, 64) if name == "repvgg_a0" else torch.randn(1, *model.pretrained_cfg["input_size"])
        assert relative(model(x), reparameterize_model(conversion.revert())(x)) < 1e-3


def test_converted_model_still_pickles() -> None:
    converted = ilmconvert.convert(timm.create_model("repvit_m0_9")).model
    with pytest.raises(ModelError, match=r"RepVit\.fuse"):
        pickle.loads(pickle.dumps(converted)).fuse()


@pytest.mark.parametrize("method", ["fuse", "fuse_model", "reparameterize", "switch_to_deploy"])
def test_folding_goes_by_the_methods_name(method: str) -> None:
    folds = type("Folds", (nn.Sequential,), {method: lambda self: "folded", "__module__": "timm.models.some"})
    conversion = ilmconvert.convert(folds(nn.BatchNorm1d(4)))
    with pytest.raises(ModelError, match=rf"expected Batch Norm to fold in Folds\.{method}\(\)"):
        getattr(conversion.model, method)()
    assert getattr(conversion.revert(), method)() == "folded"


FOLDING = [  # one model for each file of timm that has such a method
    *("efficientvim_m1", "efficientvit_m0", "fastvit_t8", "ghostnetv3_050", "iformer_t", "lcnetv2_small", "levit_128s"),
    *("mobileone_s0", "nextvit_small", "repghostnet_050", "repvit_m0_9", "shvit_s1", "tiny_vit_5m_224"),
]


def test_every_file_of_timm_that_folds_has_a_model_here() -> None:
    method = re.compile(rf"^    def ({'|'.join(_METHODS)})\(", re.MULTILINE)
    folder = Path(timm.models.__file__).parent
    files = {file.stem for file in folder.glob("*.py") if method.search(file.read_text(encoding="utf-8"))}
    assert {timm.model_entrypoint(name).__module__.rpartition(".")[2] for name in FOLDING} == files


@pytest.mark.slow
@pytest.mark.parametrize("name", FOLDING)
def test_folding_is_refused_wherever_timm_can(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    with pytest.raises(ModelError, match="expected Batch Norm to fold in"):
        reparameterize_model(ilmconvert.convert(model).model)
