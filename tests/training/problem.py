"""A recovery small enough for a test: a network with Batch Norm, and images on which it gives several answers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import ilmconvert
from tests.helpers import randomize_norms


def original() -> nn.Module:
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=2, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(0.1),
        nn.Linear(32, 8),
    )
    return randomize_norms(model).eval()


def images(count: int = 200) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    size, spread, shift = (
        torch.randn(count, 3, 16, 16, generator=generator),
        torch.rand(count, 3, 1, 1, generator=generator),
        torch.randn(count, 3, 1, 1, generator=generator),
    )
    return 2 * size * spread + shift


def conversion(model: nn.Module, **options: Any) -> ilmconvert.Conversion:
    """With the paper's own predictor, which cannot hold what Batch Norm computes: there is something to recover."""
    paper = {"key_group_size": 16, "reduction": 16, "gains": False}
    return ilmconvert.convert(model, example_inputs=images(2).to(model[0].weight.dtype), **paper | options)
