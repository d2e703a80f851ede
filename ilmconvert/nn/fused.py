"""ILM-Norm at the price of the norm beneath it: one autograd function for each memory layout that matters.

Everything ILM needs can ride on the passes over memory that the base norm makes anyway.

**Sample** (contiguous). A tensor ``(N, C, S)`` is one sample of ``N C`` channels in ``N G`` groups, so torch's Group
Norm kernel applies a scale and shift *per instance and channel* as it writes its output, and its backward returns
their gradients per instance. What is left is a mean and a norm per key group before, and after the backward kernel one
multiply-add in place: with ``n`` values per key group, mean ``m``, variance ``s`` and their gradients ``dm``, ``ds``::

    dx += a x + b        a = 2 ds / n        b = dm / n - a m

**Token** (last dimension). torch's Layer Norm kernel applies weight and bias; what the predictor adds, constant over a
key group of a token, is a second multiply-add in place: ``y += x^ D_scale + D_shift``.

Saved for backward: the input, the statistics of each group, and small tensors per instance. Second derivatives go
through the plain formula.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor

from ilmconvert.nn.functional import Config, Parameters, key_features, plain_ilm_norm, predict

__all__ = ["fused_ilm_norm"]

_OFFSET = 300.0  # mean^2 / variance from which on a variance by E[x^2] - E[x]^2 is not taken


def fused_ilm_norm(x: Tensor, parameters: Parameters, config: Config) -> Tensor | None:
    """ILM-Norm of ``x`` by a fused path, or None where the plain formula has to serve; see :func:`plain_ilm_norm`."""
    shape, _, _, how = config
    standard = how.center and how.scale_by == "var" and how.eps is not None
    if not standard or not x.is_contiguous() or x.numel() == 0 or _transformed(x):
        return None
    if how.layout == "sample":
        return _Sample.apply(x, *parameters, config)  # type: ignore[no-any-return]
    if how.layout == "token" and len(shape) == 1 and not how.unbiased and parameters[5:] == (None,) * 4:
        return _Token.apply(x, *parameters, config)  # type: ignore[no-any-return]
    return None


def _transformed(x: Tensor) -> bool:
    """Whether something looks at the operations: a compiler, a tracer, functorch, forward mode, fake tensors."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        or type(x) not in (Tensor, torch.nn.Parameter)
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
    )


def _moments(rows: Tensor, unbiased: bool) -> tuple[Tensor, Tensor]:
    """Mean and variance of each row, from two passes that only read.

    ``E[x^2] - E[x]^2`` loses digits where the mean is large against the deviation; those rows are done over.
    """
    count = rows.shape[1]
    correction = int(unbiased and count > 1)
    if not rows.is_cpu:  # there the direct way is fast, and a look at the values would wait for the device
        var, mean = torch.var_mean(rows, 1, correction=correction)
        return mean, var
    mean = rows.mean(1)
    square = mean.square()
    var = torch.linalg.vector_norm(rows, dim=1).square_().div_(count).sub_(square).clamp_(min=0)
    excess = square.sub_(var, alpha=_OFFSET)
    var.mul_(count / (count - correction))
    if excess.amax() > 0:
        lossy = excess.gt(0).nonzero().squeeze(1)
        var[lossy] = torch.var(rows[lossy], 1, correction=correction)
    return mean, var


def _moment_gradients(grad: Tensor, x: Tensor, mean: Tensor, d_mean: Tensor, d_var: Tensor, unbiased: bool) -> None:
    """Add to ``grad`` what flows back through the moments of each row of ``x``, both ``(rows, count)``."""
    count = x.shape[1]
    slope = d_var * (2 / max(count - int(unbiased), 1))
    offset = d_mean / count - slope * mean
    grad.addcmul_(x, slope[:, None]).add_(offset[:, None])


def _predict_backward(
    d_decoded: Tensor, features: Tensor, hidden: Tensor, decoded: Tensor, meta: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the features ``(2, M, K)`` and of encoder, scale decoder and shift decoder; see :func:`predict`."""
    encoder, scale_decoder, shift_decoder = meta
    decoders = torch.stack((scale_decoder / 2, shift_decoder))
    d_z = d_decoded * (1 - decoded.square())
    if encoder.shape[1] != features.shape[2]:
        return _blocks_backward(d_z, features, hidden, encoder, decoders)
    d_decoders = torch.bmm(d_z.mT, hidden)
    d_hidden = torch.bmm(d_z, decoders).mul_(hidden > 0)
    d_encoder = d_hidden.flatten(0, 1).T @ features.flatten(0, 1)
    return d_hidden @ encoder, d_encoder, d_decoders[0] / 2, d_decoders[1]


def _blocks_backward(
    d_z: Tensor, features: Tensor, hidden: Tensor, encoder: Tensor, decoders: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As :func:`_predict_backward`, for a predictor in blocks, from the gradient before the tanh."""
    blocks = features.shape[2] // encoder.shape[1]
    d_z, features, hidden = (t.unflatten(2, (blocks, -1)) for t in (d_z, features, hidden))
    encoder, decoders = encoder.unflatten(0, (blocks, -1)), decoders.unflatten(1, (blocks, -1))
    d_decoders = torch.einsum("tmbk,tmbe->tbke", d_z, hidden).flatten(1, 2)
    d_hidden = torch.einsum("tmbk,tbke->tmbe", d_z, decoders) * (hidden > 0)
    d_encoder = torch.einsum("tmbe,tmbk->bek", d_hidden, features).flatten(0, 1)
    d_features = torch.einsum("tmbe,bek->tmbk", d_hidden, encoder).flatten(2)
    return d_features, d_encoder, d_decoders[0] / 2, d_decoders[1]


def _moment_slopes(d_features: Tensor, moments: Tensor, scale: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """From gradients of the key features to those of variance and mean, both flat; see :func:`key_features`."""
    d_var, d_mean = d_features.reshape(2, -1)
    if scale is None:
        return d_var, d_mean
    d_dev, d_mean = (d_features / scale.unsqueeze(1)).reshape(2, -1)
    return d_dev / (moments[0].reshape(-1) + eps).sqrt().mul_(2), d_mean


def _affine(parameter: Tensor | None, gain: Tensor | None, decoded: Tensor, default: float, width: int) -> Tensor:
    """``parameter + gain * decoded`` for each instance and channel: ``(N, K, C / K)``."""
    spread = decoded.unsqueeze(2)
    if gain is not None:
        spread = gain.view(1, -1, width) * spread
    shifted = spread + (default if parameter is None else parameter.view(1, -1, width))
    return shifted.expand(-1, -1, width)


def _split(saved: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The inputs, and what else was kept. Saved tensors may be asked for only once (activation checkpointing)."""
    inputs = 1 + len(Parameters._fields)
    return saved[:inputs], saved[inputs:]


def _differentiable(config: Config, inputs: tuple[Tensor, ...], grad: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients as a differentiable function of the inputs, for second derivatives."""
    with torch.enable_grad():
        y = plain_ilm_norm(inputs[0], Parameters(*inputs[1:]), config)
        wanted = [i for i, t in enumerate(inputs) if t is not None and t.requires_grad]
        found = torch.autograd.grad(y, [inputs[i] for i in wanted], grad, create_graph=True, allow_unused=True)
    grads: list[Tensor | None] = [None] * (len(inputs) + 1)
    for i, value in zip(wanted, found, strict=True):
        grads[i] = value
    return tuple(grads)


class _Sample(torch.autograd.Function):
    """Group, Instance and whole-sample Layer Norm of a contiguous ``(N, C, *)``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *parameters: Any) -> Tensor:
        *tensors, config = parameters
        weight, bias, *meta, scale_gain, shift_gain, center, key_scale = tensors
        n, c = x.shape[:2]
        size, keys, groups, how = x.numel() // (n * c), config.num_key_groups, config.num_groups, config.how
        rows = x.view(n * keys, -1)
        mean, var = _moments(rows, how.unbiased)
        moments = torch.stack((var, mean)).view(2, n, keys)
        hidden, decoded = predict(key_features(moments, center, key_scale, how.eps), meta)
        scale = _affine(weight, scale_gain, decoded[0] / 2, 1.0, c // keys)
        shift = _affine(bias, shift_gain, decoded[1], 0.0, c // keys).reshape(-1)
        correction = _bessel(c // groups * size, how.unbiased)
        scale = (scale / math.sqrt(correction) if correction != 1 else scale).reshape(-1)
        sizes = (1, n * c, size, n * groups)
        flat = x.view(1, n * c, size)
        y, mu, rstd = torch.native_group_norm(flat, scale, shift, *sizes, how.eps / correction)
        ctx.config, ctx.sizes, ctx.correction = config, sizes, correction
        ctx.save_for_backward(x, *tensors, mu, rstd, scale, moments, hidden, decoded)
        return cast("Tensor", torch.ops.aten._unsafe_view(y, x.shape))  # no view: an activation may overwrite it

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        inputs, kept = _split(ctx.saved_tensors)
        if torch.is_grad_enabled():
            return _differentiable(ctx.config, inputs, grad)
        x, weight, bias, *meta, scale_gain, shift_gain, center, key_scale = inputs
        mu, rstd, scale, moments, hidden, decoded = kept
        _, n, keys = moments.shape
        flat = x.view(ctx.sizes[:3])
        d_x, d_scale, d_shift = torch.ops.aten.native_group_norm_backward(
            grad.contiguous().view_as(flat), flat, mu, rstd, scale, *ctx.sizes, [True, True, True]
        )
        if ctx.correction != 1:
            d_scale = d_scale / math.sqrt(ctx.correction)
        d_scale, d_shift = d_scale.view(n, keys, -1), d_shift.view(n, keys, -1)
        gains = [None, None]
        d_spread = [d_scale, d_shift]
        if scale_gain is not None:
            halves = (decoded[0] / 2).unsqueeze(2), decoded[1].unsqueeze(2)
            gains = [(d * h).sum(0).view_as(scale_gain) for d, h in zip(d_spread, halves, strict=True)]
            d_spread = [d * g.view(1, keys, -1) for d, g in zip(d_spread, (scale_gain, shift_gain), strict=True)]
        d_decoded = torch.stack((d_spread[0].sum(2) / 2, d_spread[1].sum(2)))
        how = ctx.config.how
        features = key_features(moments, center, key_scale, how.eps)
        d_features, *d_meta = _predict_backward(d_decoded, features, hidden, decoded, tuple(meta))
        rows = x.view(n * keys, -1)
        d_var, d_mean = _moment_slopes(d_features, moments, key_scale, how.eps)
        _moment_gradients(d_x.view_as(rows), rows, moments[1].reshape(-1), d_mean, d_var, how.unbiased)
        d_weight = None if weight is None else d_scale.sum(0).view_as(weight)
        d_bias = None if bias is None else d_shift.sum(0).view_as(bias)
        return d_x.view_as(x), d_weight, d_bias, *d_meta, *gains, None, None, None


def _bessel(count: int, unbiased: bool) -> float:
    """By how much the unbiased variance exceeds the biased one."""
    return count / (count - 1) if unbiased and count > 1 else 1.0


class _Token(torch.autograd.Function):
    """Layer Norm over the last dimension of a contiguous ``(*, C)``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *parameters: Any) -> Tensor:
        *tensors, config = parameters
        weight, bias, *meta = tensors[:5]
        keys, (channels,) = config.num_key_groups, config.shape
        tokens = x.view(-1, channels)
        rows = x.view(-1, channels // keys)
        mean, var = _moments(rows, unbiased=False)
        features = torch.stack((var, mean)).view(2, -1, keys)
        hidden, decoded = predict(features, meta)
        y, mu, rstd = torch.native_layer_norm(tokens, (channels,), weight, bias, config.how.eps)
        slope = decoded[0] * (rstd / 2)
        offset = torch.addcmul(decoded[1], slope, mu, value=-1)
        y.view_as(rows).addcmul_(rows, slope.view(-1, 1)).add_(offset.view(-1, 1))
        ctx.config = config
        ctx.save_for_backward(x, *tensors, mu, rstd, features, hidden, decoded)
        return cast("Tensor", torch.ops.aten._unsafe_view(y, x.shape))  # no view: an activation may overwrite it

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        inputs, kept = _split(ctx.saved_tensors)
        if torch.is_grad_enabled():
            return _differentiable(ctx.config, inputs, grad)
        x, weight, bias, *meta = inputs[:6]
        mu, rstd, features, hidden, decoded = kept
        keys, (channels,) = ctx.config.num_key_groups, ctx.config.shape
        tokens, rows = x.view(-1, channels), x.view(-1, channels // keys)
        grad = grad.contiguous().view_as(tokens)
        d_shift = grad.view_as(rows).sum(1).view(-1, keys)
        products = grad * tokens
        d_scale = torch.addcmul(products.view_as(rows).sum(1).view(-1, keys), d_shift, mu, value=-1).mul_(rstd)
        wanted = [False, weight is not None and ctx.needs_input_grad[1], bias is not None and ctx.needs_input_grad[2]]
        sizes = ((channels,), mu, rstd)
        _, d_weight, d_bias = torch.ops.aten.native_layer_norm_backward(grad, tokens, *sizes, weight, bias, wanted)
        scaled = products.copy_(grad) if weight is None else torch.mul(grad, weight, out=products)
        scaled.view_as(rows).addcmul_(grad.view_as(rows), (decoded[0] / 2).view(-1, 1))
        d_x, _, _ = torch.ops.aten.native_layer_norm_backward(scaled, tokens, *sizes, None, None, [True, False, False])
        d_decoded = torch.stack((d_scale / 2, d_shift))
        d_features, *d_meta = _predict_backward(d_decoded, features, hidden, decoded, tuple(meta))
        d_var, d_mean = d_features.reshape(2, -1)
        _moment_gradients(d_x.view_as(rows), rows, features[1].reshape(-1), d_mean, d_var, unbiased=False)
        return d_x.view_as(x), d_weight, d_bias, *d_meta, None, None, None, None, None
