"""timm's architectures, at the input size each declares."""

from __future__ import annotations

import timm
from torch import nn

from ilmconvert.graph import Inputs, example_inputs

__all__ = ["build", "inputs", "names", "needs_values"]


def names() -> list[str]:
    """Every architecture of timm's own; others may have registered theirs with it."""
    return [name for name in timm.list_models() if timm.model_entrypoint(name).__module__.startswith("timm.")]


def build(name: str) -> nn.Module:
    """Without pretrained weights."""
    return timm.create_model(name)  # type: ignore[no-any-return]


def inputs(name: str, model: nn.Module, batch_size: int, *, training: bool) -> Inputs:
    """One image tensor."""
    found = example_inputs(model, batch_size=batch_size)
    if found is None:
        raise ValueError(f"{name} declares no input size")
    return found


def needs_values(name: str) -> bool:
    """None does, but meta tensors run an LSTM step by step, which takes longer than computing it."""
    return name.startswith("sequencer2d")
