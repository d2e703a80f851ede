"""What the backward passes of the fused paths share: the predictor's, and second derivatives by the plain formula.

With the means ``m`` and variances ``s`` of key groups of ``n`` values, and their gradients ``dm`` and ``ds``, what
flows back through the predictor into the input is an affine map of the input for each key group::

    dx += a x + b        a = 2 ds / n        b = dm / n - a m
"""

from __future__ import annotations

import torch
from torch import Tensor

from ilmconvert.nn.functional import Config, Parameters, plain_ilm_norm

__all__ = ["differentiable", "key_slopes", "predict_backward", "split_saved"]


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


def predict_backward(
    d_decoded: Tensor, features: Tensor, hidden: Tensor, decoded: Tensor, meta: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the features ``(2, M, K)`` and of encoder, scale decoder and shift decoder.

    See :func:`ilmconvert.nn.functional.predict`.
    """
    encoder, scale_decoder, shift_decoder = meta
    decoders = torch.stack((scale_decoder / 2, shift_decoder))
    d_z = torch.ops.aten.tanh_backward(d_decoded, decoded)
    if encoder.shape[1] != features.shape[2]:
        return _blocks_backward(d_z, features, hidden, encoder, decoders)
    d_decoders = torch.bmm(d_z.mT, hidden)
    d_hidden = torch.ops.aten.threshold_backward(torch.bmm(d_z, decoders), hidden, 0)
    d_encoder = d_hidden.flatten(0, 1).T @ features.flatten(0, 1)
    return d_hidden @ encoder, d_encoder, d_decoders[0] / 2, d_decoders[1]


def _blocks_backward(
    d_z: Tensor, features: Tensor, hidden: Tensor, encoder: Tensor, decoders: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As :func:`predict_backward`, for a predictor in blocks, from the gradient before the tanh."""
    blocks = features.shape[2] // encoder.shape[1]
    d_z, features, hidden = (t.unflatten(2, (blocks, -1)) for t in (d_z, features, hidden))
    encoder, decoders = encoder.unflatten(0, (blocks, -1)), decoders.unflatten(1, (blocks, -1))
    d_decoders = torch.einsum("tmbk,tmbe->tbke", d_z, hidden).flatten(1, 2)
    d_hidden = torch.einsum("tmbk,tbke->tmbe", d_z, decoders) * (hidden > 0)
    d_encoder = torch.einsum("tmbe,tmbk->bek", d_hidden, features).flatten(0, 1)
    d_features = torch.einsum("tmbe,bek->tmbk", d_hidden, encoder).flatten(2)
    return d_features, d_encoder, d_decoders[0] / 2, d_decoders[1]


def key_slopes(d_var: Tensor, d_mean: Tensor, mean: Tensor, count: int, unbiased: bool) -> tuple[Tensor, Tensor]:
    """``a`` and ``b`` of the module docstring, for key groups of ``count`` values."""
    slope = d_var * (2 / max(count - int(unbiased), 1))
    return slope, torch.addcmul(d_mean / count, slope, mean, value=-1)
