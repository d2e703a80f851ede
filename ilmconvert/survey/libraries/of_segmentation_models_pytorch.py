"""segmentation_models_pytorch: every decoder over a few encoders of different kinds."""

from __future__ import annotations

import segmentation_models_pytorch as smp
import torch
from torch import nn

from ilmconvert.graph import Inputs

__all__ = ["build", "inputs", "names", "needs_values"]

_ENCODERS = ("resnet18", "efficientnet-b0", "mobilenet_v2", "mit_b0")
_OTHER = {  # decoders that ask for an encoder of their own kind, or do not take every one
    "dpt": ("tu-vit_tiny_patch16_224",),
    "deeplabv3": ("resnet18", "efficientnet-b0"),
    "deeplabv3plus": ("resnet18", "efficientnet-b0"),
    "linknet": ("resnet18", "efficientnet-b0"),
    "pan": ("resnet18", "efficientnet-b0"),
    "unetplusplus": ("resnet18", "efficientnet-b0"),
}


def names() -> list[str]:
    """``decoder/encoder``."""
    return [f"{kind}/{e}" for kind in sorted(smp.MODEL_ARCHITECTURES_MAPPING) for e in _OTHER.get(kind, _ENCODERS)]


def build(name: str) -> nn.Module:
    """Without pretrained weights."""
    kind, _, encoder = name.partition("/")
    return smp.create_model(kind, encoder_name=encoder, encoder_weights=None)  # type: ignore[no-any-return]


def inputs(name: str, model: nn.Module, batch_size: int, *, training: bool) -> Inputs:
    """One image tensor."""
    side = 224 if name.startswith("dpt") else 128
    x = torch.randn(batch_size, 3, side, side, generator=torch.Generator().manual_seed(0))
    return Inputs((x.to(next(model.parameters()).device),))


def needs_values(name: str) -> bool:
    """The mix transformer's drop path rates are read from a tensor."""
    return "mit_b" in name
