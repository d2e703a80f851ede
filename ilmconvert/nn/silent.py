"""The layer while its predictor says nothing: the base norm with ``weight`` and ``bias``, and nothing else to compute.

A fresh conversion in mode ``preserve`` has two decoders of zeros. As long as no gradient is asked for, the key features
need not be taken then: the output is the base norm's.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ilmconvert.nn.functional import Config, Parameters, canonical, standardize
from ilmconvert.nn.fused import transformed

__all__ = ["base_norm", "is_silent"]


def is_silent(x: Tensor, parameters: Parameters) -> bool:
    """Whether the predictor is known to add nothing here, and nothing is to be learned from it.

    Only on the CPU: on other devices a look at the weights would wait for all work before it. And not with gains: such
    a predictor speaks from the start, and the look would be in vain.
    """
    if (
        parameters.scale_gain is not None
        or torch.compiler.is_compiling()
        or torch.is_grad_enabled()
        or not x.is_cpu
        or transformed(x)
    ):
        return False
    return not (bool(parameters.scale_decoder.any()) or bool(parameters.shift_decoder.any()))


def base_norm(x: Tensor, parameters: Parameters, config: Config) -> Tensor:
    """Stage 1 with weight and bias, by torch's own kernel where there is one; ``x`` in the parameters' dtype."""
    shape, groups, _, how = config
    weight, bias = parameters.weight, parameters.bias
    if how.center and how.scale_by == "var" and not how.unbiased and how.eps is not None:
        if how.layout == "sample":
            return torch.group_norm(x, groups, weight, bias, how.eps)
        if how.layout == "token":
            return F.layer_norm(x, shape, weight, bias, how.eps)
        return F.layer_norm(x.movedim(1, -1), shape, weight, bias, how.eps).movedim(-1, 1)
    y = canonical(standardize(x, shape, groups, how), how.layout, shape)
    for parameter, apply in ((weight, Tensor.mul), (bias, Tensor.add)):
        if parameter is not None:
            y = apply(y, parameter.reshape(1, shape[0], -1))
    return y.reshape(x.shape)
