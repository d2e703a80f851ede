"""ILM-Norm at the price of the norm beneath it: which path serves an input.

Everything ILM needs can ride on the passes over memory that the base norm makes anyway. There is one path for samples
(:mod:`ilmconvert.nn.fused_image`) and one for tokens (:mod:`ilmconvert.nn.fused_token`); where neither serves, the
plain formula does.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ilmconvert.nn.functional import Config, Parameters
from ilmconvert.nn.fused_image import image_ilm_norm
from ilmconvert.nn.fused_token import token_ilm_norm

__all__ = ["fused_ilm_norm", "transformed"]


def fused_ilm_norm(x: Tensor, parameters: Parameters, config: Config) -> Tensor | None:
    """ILM-Norm of ``x`` by a fused path, or None where the plain formula has to serve; see :func:`plain_ilm_norm`."""
    shape, _, _, how = config
    standard = how.center and how.scale_by == "var" and how.eps is not None
    if not standard or x.numel() == 0 or transformed(x):
        return None
    if how.layout == "sample":
        return image_ilm_norm(x, parameters, config)
    extensions = parameters.scale_gain, parameters.shift_gain, parameters.key_center, parameters.key_scale
    blocks = parameters.encoder.shape[1] != config.num_key_groups
    if len(shape) > 1 or how.unbiased or blocks or any(t is not None for t in extensions):
        return None
    if how.layout == "token":
        return token_ilm_norm(x, parameters, config)
    positions = config._replace(how=replace(how, layout="token"))  # with the channels last, a position is a token
    return token_ilm_norm(x.movedim(1, -1), parameters, positions).movedim(-1, 1)


def transformed(x: Tensor) -> bool:
    """Whether something looks at the operations: an exporter, a tracer, functorch, forward mode, fake tensors."""
    if torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0:
        return True
    if torch.compiler.is_compiling():
        exporting = getattr(torch.compiler, "is_exporting", bool)  # torch 2.6 has none
        return not torch.compiler.is_dynamo_compiling() or exporting()
    return torch.jit.is_tracing() or type(x) not in (Tensor, torch.nn.Parameter)  # type: ignore[attr-defined, no-untyped-call]
