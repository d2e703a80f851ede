"""Build the ILM layer that takes a norm's place, carrying over everything the norm brought along."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ilmconvert.nn import ILMNorm, ILMNormAct
from ilmconvert.nn.ilm_norm import Mode
from ilmconvert.norms.parametrized import move_parametrizations_
from ilmconvert.norms.registry import NormHandler

__all__ = ["Target", "build_ilm"]

_HOOKS = (
    "_backward_pre_hooks",
    "_backward_hooks",
    "_is_full_backward_hook",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)


@dataclass(frozen=True)
class Target:
    """The choices that a plan makes for one norm; the rest follows from the norm itself."""

    num_groups: int
    num_key_groups: int
    hidden_features: int
    mode: Mode = "preserve"
    gains: bool = False
    standardized_keys: bool = False
    num_blocks: int = 1

    def __post_init__(self) -> None:
        for name in ("num_groups", "num_key_groups", "hidden_features", "num_blocks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


def build_ilm(module: nn.Module, handler: NormHandler, target: Target, *, like: Tensor | None = None) -> ILMNorm:
    """Return an ILM layer that starts as ``module``: its scale and shift, eps, device, dtype, flags and hooks.

    Args:
        module: the norm; it is read, never changed. The result takes over its ``drop`` and ``act`` submodules and,
            where the scale and shift stay what they are, its parameters.
        handler: the registered handler of the norm's class.
        target: grouping, mode and gains.
        like: gives device and dtype where the norm has no floating-point tensor of its own.
    """
    spec = handler.describe(module)
    own = next((t for t in (*module.parameters(False), *module.buffers(False)) if t.is_floating_point()), like)
    how = spec.standardization
    if target.mode == "paper" and how.scale_by == "var":
        how = replace(how, unbiased=True)
    layer = (ILMNormAct if spec.has_act else ILMNorm)(
        spec.shape,
        target.num_groups,
        standardization=how,
        num_key_groups=target.num_key_groups,
        hidden_features=target.hidden_features,
        mode=target.mode,
        weight=spec.weight,
        bias=spec.bias,
        gains=target.gains,
        standardized_keys=target.standardized_keys,
        num_blocks=target.num_blocks,
        device=None if own is None else own.device,
        dtype=None if own is None else own.dtype,
    )
    _copy_affine(module, layer, handler)
    move_parametrizations_(module, layer, handler)
    handler.set_predictor_(module, layer)
    _copy_flags(module, layer)
    if spec.has_act:
        layer.drop, layer.act = module.drop, module.act
    vars(layer).update({name: vars(module)[name] for name in _HOOKS if name in vars(module)})
    return layer


@torch.no_grad()
def _copy_affine(module: nn.Module, layer: ILMNorm, handler: NormHandler) -> None:
    weight, bias = handler.affine(module, layer.num_groups)
    if weight is bias is None and [*layer.parameters(recurse=False)] and [*module.parameters(recurse=False)]:
        raise ValueError(f"expected affine() of {type(handler).__name__} to return its scale and shift, got None")
    for name, source in (("weight", weight), ("bias", bias)):
        parameter = getattr(layer, name)
        if parameter is None or source is None:
            continue
        if source.numel() != parameter.numel():
            raise ValueError(
                f"expected {parameter.numel()} values of {name} from affine() of {type(handler).__name__}, got "
                f"{source.numel()}"
            )
        if isinstance(source, nn.Parameter) and source.shape == parameter.shape and layer.mode == "preserve":
            setattr(layer, name, source)  # the same object: what is tied to it stays tied
        else:
            parameter.copy_(source.reshape(parameter.shape))
    if layer.mode == "paper" and layer.weight is not None and weight is not None:
        layer.weight.add_(0.5)  # the paper's B_omega takes the norm's scale; weight = B_omega + 1/2


def _copy_flags(module: nn.Module, layer: ILMNorm) -> None:
    """What was frozen stays frozen: the new parameters train if any of the norm's did, or if it had none."""
    named = (getattr(module, name, None) for name in ("weight", "bias"))  # which a parametrization may compute
    sources = [*module.parameters(recurse=False), *(t for t in named if isinstance(t, Tensor))]
    trains = any(t.requires_grad for t in sources) if sources else True
    for name, parameter in layer.named_parameters():
        source = getattr(module, name, None)
        parameter.requires_grad_(trains if source is None else source.requires_grad)
    for part in layer.modules():
        part.training = module.training
