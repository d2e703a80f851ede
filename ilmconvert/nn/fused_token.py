"""Layer Norm over the last dimension with ILM's rescaling: an instance is one token of ``C`` channels.

In eager mode torch's Layer Norm kernel applies weight and bias. What the predictor adds is constant over a key group of
a token, so it is one multiply-add in place, ``y += x^ D_scale + D_shift``, and so is what it adds to the kernel's own
gradient. With the group's sums ``P = sum(g x^)`` and ``S = sum(g)`` of a token, ``p = D_scale / sqrt(var + eps)`` and
``a``, ``b`` as in :mod:`ilmconvert.nn.gradients`::

    dx += p g + (a - r sum(p P) / C) x + (b - sum(p S) / C + r mean sum(p P) / C)         r = 1 / sqrt(var + eps)

Under torch.compile the same is written as plain arithmetic, which inductor fuses with what surrounds it. It makes one
loop over the memory of two that follow each other, if nothing smaller has to be made in between: so there the predictor
is shown sums, which are ``C / K`` times the moments, and it is the encoder that is divided.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ilmconvert.nn.branches import Branches, JoinedBranches, side_by_side
from ilmconvert.nn.functional import Config, Parameters, key_features
from ilmconvert.nn.gradients import differentiable, split_saved
from ilmconvert.nn.kernels import moments, row_sums

__all__ = ["token_ilm_norm"]

_FEW = 8  # key groups up to which their matrix products are joined, where a compiler joins what surrounds them


def token_ilm_norm(x: Tensor, parameters: Parameters, config: Config) -> Tensor:
    """ILM-Norm in layout ``token`` of ``(*, C)``, for a predictor in one block and without extensions."""
    function = _Arithmetic if torch.compiler.is_compiling() else _Token
    return function.apply(x.contiguous(), *parameters, config)  # type: ignore[no-any-return]


class _Token(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *parameters: Any) -> Tensor:
        *tensors, config = parameters
        weight, bias, *meta = tensors[:5]
        (channels,) = config.shape
        tokens, rows = x.view(-1, channels), x.view(-1, channels // config.num_key_groups)
        mean, var, _ = moments(rows.view(len(tokens), config.num_key_groups, -1), 2, config.num_key_groups)
        keys = Branches.of(key_features(var, mean, None, None), meta, _tanh)
        y, mu, rstd = torch.native_layer_norm(tokens, (channels,), weight, bias, config.how.eps)
        slope = keys.decoded[0] * (rstd / 2)
        offset = torch.addcmul(keys.decoded[1], slope, mu, value=-1)
        y.view_as(rows).addcmul_(rows, slope.view(-1, 1)).add_(offset.view(-1, 1))
        ctx.config = config
        ctx.save_for_backward(x, *tensors, mu, rstd, slope, *keys)
        return torch.ops.aten._unsafe_view(y, x.shape)  # type: ignore[no-any-return]  # an activation may overwrite it

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        inputs, (mu, rstd, slope, *kept) = split_saved(ctx.saved_tensors)
        if torch.is_grad_enabled():
            return differentiable(ctx.config, inputs, grad)
        x, weight, bias, encoder = inputs[:4]
        keys, (channels,) = Branches(*kept), ctx.config.shape
        tokens, rows = x.view(-1, channels), x.view(-1, channels // ctx.config.num_key_groups)
        g = grad.contiguous().view_as(tokens)
        d_scale, d_shift = _key_sums(g, tokens, mu, rstd / 2, ctx.config.num_key_groups)
        d_features, *d_meta = keys.backward(d_scale, d_shift, encoder, 1 / rows.shape[1])
        a, b = d_features.unbind()
        wanted = [True, weight is not None, bias is not None]
        d_x, d_weight, d_bias = torch.ops.aten.native_layer_norm_backward(
            g, tokens, (channels,), mu, rstd, weight, bias, wanted
        )
        b = torch.addcmul(b, a.mul_(2), keys.features[1], value=-1)
        first = (slope * d_shift).sum(1, keepdim=True) / channels
        second = (slope * d_scale).sum(1, keepdim=True) * (rstd * (2 / channels))
        b.add_(torch.addcmul(-first, second, mu))
        a.sub_(second)
        d_rows = d_x.view_as(rows)
        d_rows.addcmul_(g.view_as(rows), slope.view(-1, 1)).addcmul_(rows, a.view(-1, 1)).add_(b.view(-1, 1))
        return d_x.view_as(x), d_weight, d_bias, *d_meta, None, None, None, None, None


def _key_sums(g: Tensor, x: Tensor, mean: Tensor, factor: Tensor, keys: int) -> tuple[Tensor, Tensor]:
    """``factor sum(g (x - mean))`` and ``sum(g)`` of each key group of each token: two ``(M, K)``."""
    m, channels = x.shape
    rows = (1, m * keys, channels // keys)
    products, sums = row_sums(g.view(rows), x.view(rows), mean.view(1, m), factor.view(1, m))
    return products.view(m, keys), sums.view(m, keys)


class _Arithmetic(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *parameters: Any) -> Tensor:
        *tensors, config = parameters
        weight, bias, *meta = tensors[:5]
        share, width = 1 / config.shape[0], config.shape[0] // config.num_key_groups  # not divided for every token anew
        rows = x.view(-1, config.num_key_groups, width)
        sums = rows.sum(2)
        mean = sums / width
        power = (rows - mean.unsqueeze(2)).square().sum(2)
        meta[0] = meta[0] / width
        if config.num_key_groups <= _FEW:
            keys: Branches | JoinedBranches = JoinedBranches.of(side_by_side(power, sums), meta, _tanh)
        else:
            keys = Branches.of(key_features(power, sums, None, None), meta, _tanh)
        for_scale, for_shift = keys.decoded.unsqueeze(3).unbind()
        mu = sums.sum(1, keepdim=True) * share
        between = (mean - mu).square().sum(1, keepdim=True) * width
        rstd = torch.rsqrt((power.sum(1, keepdim=True) + between) * share + config.how.eps)
        standardized = (rows - mu.unsqueeze(2)) * rstd.unsqueeze(2)
        y = _own(weight, rows, 1.0) * standardized + _own(bias, rows, 0.0)
        y = y + for_scale * (standardized * 0.5) + for_shift
        ctx.config = config
        ctx.save_for_backward(x, *tensors, mu, rstd, *keys)
        return torch.ops.aten._unsafe_view(y, x.shape)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        inputs, (mu, rstd, *kept) = split_saved(ctx.saved_tensors)
        x, weight, bias, encoder = inputs[:4]
        config = ctx.config
        share, width = 1 / config.shape[0], config.shape[0] // config.num_key_groups
        rows = x.view(-1, config.num_key_groups, width)
        g, tokens = grad.reshape(rows.shape), x.view(len(rows), -1) - mu
        flat = grad.reshape(tokens.shape)
        d_shift = g.sum(2)
        if config.num_key_groups <= _FEW:
            keys: Branches | JoinedBranches = JoinedBranches(*kept)
            d_scale = (g * ((rows - mu.unsqueeze(2)) * (rstd * 0.5).unsqueeze(2))).sum(2)
        else:
            keys = Branches(*kept)
            d_scale = ((g * rows).sum(2) - mu * d_shift) * (rstd * 0.5)  # centered, it would be one more loop here
        d_features, d_encoder, *d_decoders = keys.backward(d_scale, d_shift, encoder / width, 1.0)
        a = d_features[0] * 2
        b = torch.addcmul(d_features[1], a, keys.features[1] / width, value=-1)
        half, weighted = keys.decoded[0] * 0.5, flat if weight is None else flat * weight
        first = (weighted.sum(1, keepdim=True) + (half * d_shift).sum(1, keepdim=True)) * share
        second = (weighted * tokens).sum(1, keepdim=True) * rstd + (keys.decoded[0] * d_scale).sum(1, keepdim=True)
        second = second * rstd * share
        slope, offset = a - second * rstd, b - first * rstd + second * rstd * mu
        own = _own(weight, rows, 1.0) + half.unsqueeze(2)
        d_x = g * (rstd.unsqueeze(2) * own) + rows * slope.unsqueeze(2) + offset.unsqueeze(2)
        d_weight = None if weight is None else _column_sum((flat * tokens * rstd).view(x.shape))
        d_bias = None if bias is None else _column_sum(flat.view(x.shape))
        return d_x.view(x.shape), d_weight, d_bias, d_encoder / width, *d_decoders, None, None, None, None, None


def _tanh(z: Tensor) -> Tensor:
    """In place, to within 1e-7, which is little beside a weight or a bias; torch's own takes several times as long."""
    return z.mul_(2).sigmoid_().mul_(2).sub_(1)


def _column_sum(x: Tensor) -> Tensor:
    """Of ``(*, C)`` along all but the last dimension: ``(C,)``.

    In two steps, of which the first sums a few rows: all the way down the columns, each load would meet another page.
    """
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # brings sympy, a third of a second

    rows = math.prod(x.shape[:-1])
    size = next((n for n in (256, 64, 16) if statically_known_true(rows % n == 0)), math.prod(x.shape[-2:-1]))
    return x.view(-1, size, x.shape[-1]).sum(1).sum(0)


def _own(parameter: Tensor | None, rows: Tensor, default: float) -> Tensor | float:
    """A parameter as it meets ``(M, K, C / K)``."""
    return default if parameter is None else parameter.view(rows.shape[1:])
