"""Norms whose scale or shift is computed by ``torch.nn.utils.parametrize``: the computation moves to the ILM layer."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.utils import parametrize

from ilmconvert.nn import ILMNorm
from ilmconvert.norms.registry import NormHandler

__all__ = ["move_parametrizations_", "own_parameters"]


def own_parameters(module: nn.Module) -> int:
    """How many parameters a norm has itself; a scale or shift that is computed counts as one that is not.

    Example:
        >>> from torch.nn.utils.parametrizations import weight_norm
        >>> own_parameters(nn.LayerNorm(4)), own_parameters(weight_norm(nn.LayerNorm(4), dim=None))
        (8, 8)
    """
    computed: list[Tensor] = [getattr(module, name) for name in getattr(module, "parametrizations", ())]
    return sum(tensor.numel() for tensor in (*module.parameters(recurse=False), *computed))


def move_parametrizations_(module: nn.Module, layer: ILMNorm, handler: NormHandler) -> None:
    """Let ``layer`` compute its scale and shift as ``module`` did, from the same parameters.

    Raises:
        ValueError: the layer's scale or shift is not to be the norm's.
    """
    for name in (n for n in ("weight", "bias") if parametrize.is_parametrized(module, n)):
        if layer.mode == "paper" or not handler.describe(module).preserves:
            raise ValueError(f"the {name} is parametrized, and its values are not those that the ILM layer starts with")
        parametrize.register_parametrization(layer, name, nn.Identity(), unsafe=True)
        getattr(layer, "parametrizations")[name] = getattr(module, "parametrizations")[name]  # noqa: B009
