"""torchvision's models: classification, segmentation, detection, video, optical flow, and the quantizable ones.

Detection models choose boxes by value, so they need real tensors; in training they take targets.
"""

from __future__ import annotations

import inspect as python
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torchvision import models
from torchvision.models.regnet import BlockParams

from ilmconvert.graph import Inputs

__all__ = ["build", "inputs", "names", "needs_values"]

_SIDE = {"inception_v3": 299, "quantized_inception_v3": 299}
_VIDEO = {"mvit_v1_b": (16, 224), "mvit_v2_s": (16, 224), "s3d": (16, 224)}


def names() -> list[str]:
    """Every model that ``torchvision.models.list_models`` knows."""
    return list(models.list_models())


def build(name: str) -> nn.Module:
    """Without pretrained weights, of the backbone neither."""
    maker = models.get_model_builder(name)
    backbone = "weights_backbone" in python.signature(maker).parameters
    with patch.object(BlockParams, "from_init_params", _on_cpu(BlockParams.from_init_params)):
        model: nn.Module = maker(weights=None, **({"weights_backbone": None} if backbone else {}), **_arguments(name))
    if hasattr(model, "transform"):  # detectors enlarge their input, by default to 800 pixels
        model.transform.min_size, model.transform.max_size = (96,), 128  # type: ignore[union-attr]
    return model


def _on_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    """RegNet computes its widths with tensors, which must have values while its weights may be meta tensors."""

    def run(**arguments: Any) -> Any:
        with torch.device("cpu"):
            return function(**arguments)

    return run


def _arguments(name: str) -> dict[str, Any]:
    return {"init_weights": True} if name in ("googlenet", "inception_v3") else {}


def inputs(name: str, model: nn.Module, batch_size: int, *, training: bool) -> Inputs:
    """Images, clips, pairs of images, or lists of images with targets."""
    kind = _kind(name)
    if kind == "detection":
        return _detection(name, batch_size, training)
    if kind == "optical_flow":
        return Inputs((_noise(model, batch_size, 3, 128, 128), _noise(model, batch_size, 3, 128, 128)))
    if kind == "video":
        frames, side = _VIDEO.get(name, (8, 112))
        return Inputs((_noise(model, batch_size, 3, frames, side, side),))
    side = _SIDE.get(name, 224)
    return Inputs((_noise(model, batch_size, 3, side, side),))


def needs_values(name: str) -> bool:
    """Detection does."""
    return _kind(name) == "detection"


def _kind(name: str) -> str:
    home = models.get_model_builder(name).__module__.split(".")
    return home[2] if len(home) > 3 else "classification"


def _noise(model: nn.Module, *size: int) -> Tensor:
    like = next(model.parameters())
    return torch.randn(*size, generator=torch.Generator().manual_seed(0)).to(like.device, like.dtype)


def _detection(name: str, batch_size: int, training: bool) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    images = [torch.rand(3, 96, 128, generator=generator) for _ in range(batch_size)]
    if not training:
        return Inputs((images,))
    target: dict[str, Tensor] = {"boxes": torch.tensor([[8.0, 8.0, 72.0, 80.0]]), "labels": torch.tensor([1])}
    if "mask" in name:
        target["masks"] = torch.ones(1, 96, 128, dtype=torch.uint8)
    if "keypoint" in name:
        target["keypoints"] = torch.full((1, 17, 3), 40.0)
    return Inputs((images, [dict(target) for _ in images]))
