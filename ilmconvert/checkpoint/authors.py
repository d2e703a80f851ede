"""Checkpoints of the paper's authors (their PyTorch 1.0 release), loaded onto a model converted in mode ``paper``.

Their layer names and ours, with ``C`` channels, ``K`` key groups and an embedding of ``e``:

=========================  ==================  ==================================
theirs                     shape               ours
=========================  ==================  ==================================
``weight_bias``            ``(1, C, 1, 1)``    ``weight``, 1/2 more (see ILMNorm)
``bias_bias``              ``(1, C, 1, 1)``    ``bias``
``fc_embed.0.weight``      ``(e, K)``          ``predictor.encoder.weight``
``fc_weight.0.0.weight``   the same tensor     (the same)
``fc_bias.0.0.weight``     the same tensor     (the same)
``fc_weight.1.weight``     ``(K, e)``          ``predictor.scale_decoder.weight``
``fc_bias.1.weight``       ``(K, e)``          ``predictor.shift_decoder.weight``
=========================  ==================  ==================================
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from ilmconvert.checkpoint.weights import check_keys, read_state_dict
from ilmconvert.errors import CheckpointError
from ilmconvert.nn import ILMNorm

__all__ = ["load_authors", "translate_authors"]

_NAMES = {
    "weight_bias": "weight",
    "bias_bias": "bias",
    "fc_embed.0.weight": "predictor.encoder.weight",
    "fc_weight.1.weight": "predictor.scale_decoder.weight",
    "fc_bias.1.weight": "predictor.shift_decoder.weight",
}
_SHARED = ("fc_weight.0.0.weight", "fc_bias.0.0.weight")  # the encoder again


def load_authors(file: str | Path, model: nn.Module) -> None:
    """Load a checkpoint of the authors into ``model``, strictly.

    Args:
        file: their checkpoint; a ``module.`` prefix on every key and an enclosing ``state_dict`` are removed.
        model: a model whose norms were converted in mode ``paper`` (torchvision ResNet for their ImageNet files).

    Raises:
        CheckpointError: unreadable, a model with no layer of mode ``paper``, an encoder whose shared copies differ, or
            keys and shapes that do not fit, named.
    """
    layers = {name: m for name, m in model.named_modules(remove_duplicate=False) if isinstance(m, ILMNorm)}
    if not layers or any(layer.mode != "paper" for layer in layers.values()):
        raise CheckpointError(
            "expected a model converted in mode 'paper' for the authors' checkpoint, got one with "
            f"{len(layers)} ILM layers of modes {sorted({layer.mode for layer in layers.values()})}; convert with "
            "mode='paper'"
        )
    state = {key.removeprefix("module."): value for key, value in read_state_dict(file).items()}
    translated = translate_authors(state, layers, str(file))
    for key, value in model.state_dict().items():  # their PyTorch 1.0 files may lack these counters
        if key.endswith("num_batches_tracked"):
            translated.setdefault(key, value)
    check_keys(model.state_dict(), translated, str(file))
    model.load_state_dict(translated)


def translate_authors(
    state: dict[str, Tensor], layers: dict[str, ILMNorm], where: str = "state dict"
) -> dict[str, Tensor]:
    """Rename the authors' keys at the given layers to ours; all other keys stay.

    Raises:
        CheckpointError: copies of the shared encoder that differ.
    """
    result = {}
    for key, value in state.items():
        prefix, name = _split(key, layers)
        if name in _SHARED:
            encoder = state.get(f"{prefix}fc_embed.0.weight")
            if encoder is None or not torch.equal(encoder, value):
                raise CheckpointError(f"expected {key!r} in {where!r} to equal the encoder it shares, but it differs")
        elif name in _NAMES:
            result[prefix + _NAMES[name]] = _reshape(name, value, layers[prefix.rstrip(".")])
        else:
            result[key] = value
    return result


def _split(key: str, layers: dict[str, ILMNorm]) -> tuple[str, str]:
    """A layer's path, with the dot behind it, and their name of its tensor; both are empty for all other keys."""
    for name in (*_NAMES, *_SHARED):
        prefix = key.removesuffix(name)
        if prefix != key and prefix.rstrip(".") in layers:
            return prefix, name
    return "", ""


def _reshape(name: str, value: Tensor, layer: ILMNorm) -> Tensor:
    if name not in ("weight_bias", "bias_bias"):
        return value
    flat = value.flatten() + (0.5 if name == "weight_bias" else 0.0)
    return flat.reshape(layer.normalized_shape) if flat.numel() == layer.num_channels else flat
