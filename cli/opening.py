"""From a MODEL argument to a model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ilmconvert.errors import UsageError

if TYPE_CHECKING:
    from torch import nn

__all__ = ["open_model", "sample_inputs"]


def open_model(
    name: str,
    *,
    pretrained: bool = False,
    checkpoint: Path | None = None,
    model_args: tuple[tuple[str, Any], ...] = (),
    original: bool = False,
    trust_factory: bool = False,
) -> nn.Module:
    """Build or load the model that a MODEL argument means.

    Args:
        name: a timm name, a saved folder, or ``package.module:factory``.
        pretrained, checkpoint, model_args: as the options say.
        original: of a saved folder, give the original norms back.
        trust_factory: call the factory that a saved folder names.
    """
    from ilmconvert.checkpoint import is_saved, load_conversion, load_weights
    from ilmconvert.sources import build

    if is_saved(name):
        if pretrained or model_args:
            raise UsageError(
                f"{name!r} is a saved conversion with weights of its own; leave out --pretrained and --model-arg"
            )
        conversion = load_conversion(name, trust_factory=trust_factory)
        model = conversion.revert() if original else conversion.model
    else:
        model = build(name, pretrained=pretrained, model_args=dict(model_args))
    if checkpoint is not None:
        load_weights(model, checkpoint)
    return model


def sample_inputs(model: nn.Module, input_size: tuple[int, ...] | None) -> Any:
    """Random inputs of the size asked for, or of the size the model declares."""
    from ilmconvert.graph import example_inputs

    return example_inputs(model, input_size=input_size)
