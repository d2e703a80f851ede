"""Group, Instance and whole-sample Layer Norm with ILM's rescaling: what a sample's channels share with its positions.

Forward, one pass reads mean and variance of the finest groups that both norm groups and key groups are made of, and
theirs follow by the law of total variance; with what the predictor says, the whole layer is one affine map per instance
and channel::

    y = scale (x - mean_G) / sqrt(var_G + eps) + shift

Backward, one pass reads ``sum(g x)`` and ``sum(g)`` of each channel, from which all gradients of the parameters follow,
and, with ``r = 1 / sqrt(var_G + eps)`` and ``a``, ``b`` of the key groups (see :mod:`ilmconvert.nn.gradients`)::

    dx = r scale g + (a - r^2 S2) x + (b - r S1 + r^2 S2 mean_G)

where ``S1`` and ``S2`` are the group's means of ``scale g`` and ``scale g x^``. Saved for backward: the input and what
is per instance and channel or smaller.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ilmconvert.nn.functional import Config, Parameters, key_features, predict
from ilmconvert.nn.gradients import differentiable, key_slopes, predict_backward, split_saved
from ilmconvert.nn.kernels import affine, coarser, group_sums, moments, per_channel

__all__ = ["image_ilm_norm"]

_FAR = 30.0  # mean over deviation from which on sums are taken of the centered input


def image_ilm_norm(x: Tensor, parameters: Parameters, config: Config) -> Tensor:
    """ILM-Norm in layout ``sample`` of ``(N, C, *)``; contiguous and channels_last inputs keep their memory format."""
    channels_last = not x.is_contiguous() and x.movedim(1, -1).is_contiguous()
    return _Image.apply(x if channels_last else x.contiguous(), *parameters, config)  # type: ignore[no-any-return]


class _View(NamedTuple):
    """How the tensors of one call lie in memory, see :mod:`ilmconvert.nn.kernels`."""

    shape: torch.Size
    dim: int

    @classmethod
    def of(cls, x: Tensor) -> _View:
        return cls(x.shape, 2 if x.is_contiguous() else 1)

    def canonical(self, x: Tensor) -> Tensor:
        n, c = self.shape[:2]
        if self.dim == 2:
            return x.contiguous().view(n, c, -1)
        return x.movedim(1, -1).contiguous().view(n, -1, c)

    def restored(self, x: Tensor) -> Tensor:
        """A fresh tensor in the input's shape, and not as a view: an activation may overwrite it."""
        if self.dim == 2:
            return torch.ops.aten._unsafe_view(x, self.shape)  # type: ignore[no-any-return]
        n, c, *inner = self.shape
        y = x.view(n, *inner, c).movedim(-1, 1)
        return y if torch.compiler.is_compiling() else x.as_strided_(y.shape, y.stride())


def _grouped(value: Tensor, groups: int) -> Tensor:
    """``(..., C)`` as ``(..., groups, C / groups)``."""
    return value.view(*value.shape[:-1], groups, -1)


def _rescaled(
    own: Tensor | None, gain: Tensor | None, decoded: Tensor, default: float, half: float, channels: int
) -> Tensor:
    """``own + gain * decoded * half`` for each instance and channel: from ``(N, K)`` to ``(N, C)``."""
    if gain is None:
        spread = per_channel(decoded, channels)
        return spread * half + default if own is None else torch.add(own, spread, alpha=half)
    base = own if own is not None else gain.new_full((), default)
    return torch.addcmul(base, gain, per_channel(decoded, channels), value=half)


def _halved(pair: Tensor) -> Tensor:
    """``(2, ...)`` with the first, of the scale, halved: the predictor's ``2 D_scale - 1`` counts half."""
    pair = pair.clone()
    pair[0].div_(2)
    return pair


class _Image(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *parameters: Any) -> Tensor:
        *tensors, config = parameters
        weight, bias, *meta, scale_gain, shift_gain, center, key_scale = tensors
        view, how = _View.of(x), config.how
        flat = view.canonical(x)
        c, size = x.shape[1], flat.shape[view.dim]
        groups, keys = config.num_groups, config.num_key_groups
        finest = moments(flat, view.dim, math.lcm(groups, keys))
        mean, var = coarser(*finest, groups)
        key_mean, key_var = coarser(*finest, keys)
        if how.unbiased:
            var, key_var = var * _bessel(c // groups * size), key_var * _bessel(c // keys * size)
        features = key_features(key_var, key_mean, center, key_scale, how.eps)
        hidden, decoded = predict(features, meta)
        scale = _rescaled(weight, scale_gain, decoded[0], 1.0, 0.5, c)
        shift = _rescaled(bias, shift_gain, decoded[1], 0.0, 1.0, c)
        y = affine(flat, scale, shift, view.dim, mean, var, how.eps)
        ctx.config, ctx.view = config, view
        ctx.save_for_backward(x, *tensors, mean, var, scale, key_mean, key_var, features, hidden, decoded)
        return view.restored(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        inputs, kept = split_saved(ctx.saved_tensors)
        config, view = ctx.config, ctx.view
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return differentiable(config, inputs, grad)
        x, weight, bias, *meta, scale_gain, shift_gain, _, key_scale = inputs
        mean, var, scale, key_mean, key_var, features, hidden, decoded = kept
        flat, g = view.canonical(x), view.canonical(grad)
        (n, c), size = x.shape[:2], flat.shape[view.dim]
        groups, keys, how = config.num_groups, config.num_key_groups, config.how
        rstd = torch.rsqrt(var + how.eps)
        products, sums = _centered_sums(g, flat, mean, rstd, view.dim)
        gradients = torch.stack(((_grouped(products, groups) * rstd.unsqueeze(2)).view(n, c), sums))

        d_own, d_spread = gradients.sum(1), gradients
        d_gains: tuple[Tensor | None, ...] = (None, None)
        if scale_gain is not None:
            d_gains = (gradients * per_channel(_halved(decoded), c)).sum(1).view(2, *scale_gain.shape).unbind()
            d_spread = gradients * torch.stack((scale_gain, shift_gain)).unsqueeze(1)
        d_decoded = _halved(_grouped(d_spread, keys).sum(3))
        d_features, *d_meta = predict_backward(d_decoded, features, hidden, decoded, tuple(meta))
        d_x = None
        if ctx.needs_input_grad[0]:
            d_var, d_mean = _moment_gradients(d_features, key_var, key_scale, how.eps)
            slope, offset = key_slopes(d_var, d_mean, key_mean, c // keys * size, how.unbiased)
            count = c // groups * size
            second, first = (_grouped(scale * gradients, groups).sum(3) * (rstd / count)).unbind()
            second = second * rstd * (_bessel(count) if how.unbiased else 1.0)
            offset = _joined(torch.addcmul(-first, second, mean), offset, c)
            d_x = affine(g, scale, offset, view.dim, torch.zeros_like(mean), var, how.eps)
            d_x = view.restored(d_x.addcmul_(flat, _joined(-second, slope, c).unsqueeze(view.dim)))
        d_weight = None if weight is None else d_own[0].view_as(weight)
        d_bias = None if bias is None else d_own[1].view_as(bias)
        return d_x, d_weight, d_bias, *d_meta, *d_gains, None, None, None


def _joined(first: Tensor, second: Tensor, channels: int) -> Tensor:
    """The sum of two ``(N, groups)`` of different groupings, as ``(N, C)``."""
    if first.shape == second.shape:
        return per_channel(first + second, channels)
    return per_channel(first, channels) + per_channel(second, channels)


def _centered_sums(g: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """``sum(g (x - mean_G))`` and ``sum(g)`` of each channel.

    The difference of the sums loses digits where a mean is large against its deviation; then the input is centered
    first, which costs a copy of it. A compiler fuses the centering with the sum.
    """
    channels = x.shape[3 - dim]
    center = per_channel(mean, channels)
    if torch.compiler.is_compiling() or (x.is_cpu and (mean * rstd).abs().amax() > _FAR):
        return group_sums(g, x - center.unsqueeze(dim), dim, channels)
    products, sums = group_sums(g, x, dim, channels)
    return torch.addcmul(products, sums, center, value=-1), sums


def _bessel(count: int) -> float:
    """By how much the unbiased variance exceeds the biased one; a single value has none."""
    return count / (count - 1) if count > 1 else 1.0


def _moment_gradients(d_features: Tensor, var: Tensor, scale: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """From gradients of the key features to those of variance and mean: two ``(N, K)``; see :func:`key_features`."""
    if scale is None:
        return d_features[0], d_features[1]
    d_dev, d_mean = d_features / scale.unsqueeze(1)
    return d_dev / (var + eps).sqrt().mul_(2), d_mean
