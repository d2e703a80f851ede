"""The start that running statistics give: right on average, exact where an instance has just these statistics."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ilmconvert.norms import build_ilm, find
from ilmconvert.norms.build import Target
from tests.helpers import relative


@pytest.mark.parametrize("groups", [1, 4, 16])
@pytest.mark.parametrize("affine", [True, False])
def test_exact_for_an_instance_with_the_running_statistics(groups: int, affine: bool) -> None:
    x = torch.randn(1, 16, 8, 8, dtype=torch.float64) * torch.rand(1, 16, 1, 1) + torch.randn(1, 16, 1, 1)
    norm = nn.BatchNorm2d(16, affine=affine).double().eval()
    var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
    norm.running_mean.copy_(mean)
    norm.running_var.copy_(var)
    if affine:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    layer = build_ilm(norm, find(norm).handler, Target(groups, 1, 2))
    assert relative(norm(x), layer(x)) < 1e-12


def test_fresh_norm_starts_from_its_own_affine() -> None:
    norm = nn.BatchNorm2d(8, eps=0.0)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    layer = build_ilm(norm, find(norm).handler, Target(1, 1, 2))
    assert torch.allclose(layer.weight, norm.weight, atol=1e-6)
    assert torch.equal(layer.bias, norm.bias)
