"""What the backward passes of the fused paths share, besides the predictor's own (:mod:`ilmconvert.nn.branches`).

With the means ``m`` and variances ``s`` of key groups of ``n`` values, and their gradients ``dm`` and ``ds``, what
flows back through the predictor into the input is an affine map of the input for each key group::

    dx += a x + b        a = 2 ds / n        b = dm / n - a m
"""

from __future__ import annotations

import torch
from torch import Tensor

from ilmconvert.nn.functional import Config, Parameters, plain_ilm_norm

__all__ = ["differentiable", "split_saved"]


def split_saved(saved: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The inputs, and what else was kept. Saved tensors may be asked for only once (activation checkpointing)."""
    inputs = 1 + len(Parameters._fields)
    return saved[:inputs], saved[inputs:]


def differentiable(config: Config, inputs: tuple[Tensor, ...], grad: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients as a differentiable function of the inputs, for second derivatives."""
    with torch.enable_grad():
        y = plain_ilm_norm(inputs[0], Parameters(*inputs[1:]), config)
        wanted = [i for i, t in enumerate(inputs) if t is not None and t.requires_grad]
        found = torch.autograd.grad(y, [inputs[i] for i in wanted], grad, create_graph=True, allow_unused=True)
    grads: list[Tensor | None] = [None] * (len(inputs) + 1)
    for i, value in zip(wanted, found, strict=True):
        grads[i] = value
    return tuple(grads)
