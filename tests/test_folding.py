"""Methods that fold norms into convolutions raise on converted modules, and work again after an undo."""

from __future__ import annotations

import copy
import pickle

import pytest
import timm
import torch
from timm.utils import reparameterize_model

import ilmconvert
from ilmconvert.errors import ModelError
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
