"""Group, Instance and whole-sample Layer Norm with ILM's rescaling: what a sample's channels share with its positions.

Forward, one pass reads the mean and variance of each channel; those of norm groups and key groups follow from them by
the law of total variance; with what the predictor says, the whole layer is one affine map per instance and channel::

    y = f x + (shift - f mean_G)        f = scale / sqrt(var_G + eps)

Backward, one pass reads ``sum(g x)`` and ``sum(g)`` of each channel, from which all gradients of the parameters follow,
and, with ``r = 1 / sqrt(var_G + eps)`` and ``a``, ``b`` of the key groups (see :mod:`ilmconvert.nn.gradients`)::

    dx = r scale g + (a - r^2 S2) x + (b - r S1 + r^2 S2 mean_G)

where ``S1`` and ``S2`` are the group's means of ``scale g`` and ``scale g x^``. Saved for backward: the input and what
is per instance and channel or smaller.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ilmconvert.nn.functional import Config, Parameters, key_features, predict
from ilmconvert.nn.gradients import differentiable, key_slopes, predict_backward, split_saved
from ilmconvert.nn.kernels import affine, channel_moments, channel_sums, group_moments_of

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


def _rescaled(parameter: Tensor | None, gain: Tensor | None, decoded: Tensor, default: float, half: float) -> Tensor:
    """``parameter + gain * decoded * half``, from ``(N, K)`` to ``(N, K, C / K)``; without either, ``(N, K, 1)``."""
    keys = decoded.shape[1]
    spread = decoded.unsqueeze(2)
    own = None if parameter is None else parameter.view(1, keys, -1)
    if gain is not None:
        factor = gain.view(1, keys, -1)
        return default + factor * spread * half if own is None else torch.addcmul(own, factor, spread, value=half)
    return default + spread * half if own is None else torch.add(own, spread, alpha=half)


def _grouped(value: Tensor, groups: int) -> Tensor:
    """``(N, C)`` as ``(N, groups, C / groups)``."""
    return value.view(len(value), groups, -1)


def _per_channel(value: Tensor, channels: int) -> Tensor:
    """``(N, K)`` or ``(N, K, C / K)`` or ``(N, K, 1)`` as ``(N, C)``."""
    n, groups = value.shape[:2]
    return value.reshape(n, groups, -1).expand(n, groups, channels // groups).reshape(n, channels)


def _joined(first: Tensor, second: Tensor, channels: int) -> Tensor:
    """The sum of two ``(N, groups)`` of different groupings, as ``(N, C)``."""
    if first.shape == second.shape:
        return _per_channel(first + second, channels)
    return _per_channel(first, channels) + _per_channel(second, channels)


class _Image(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *parameters: Any) -> Tensor:
        *tensors, config = parameters
        weight, bias, *meta, scale_gain, shift_gain, center, key_scale = tensors
        view, how = _View.of(x), config.how
        flat = view.canonical(x)
        (n, c), size = x.shape[:2], flat.shape[view.dim]
        groups, keys = config.num_groups, config.num_key_groups
        channels = channel_moments(flat, view.dim)
        mean, var = group_moments_of(*channels, groups)
        key_mean, key_var = (mean, var) if keys == groups else group_moments_of(*channels, keys)
        if how.unbiased:
            var, key_var = var * _bessel(c // groups * size), key_var * _bessel(c // keys * size)
        moments = torch.stack((key_var, key_mean))
        hidden, decoded = predict(key_features(moments, center, key_scale, how.eps), meta)
        scale = _per_channel(_rescaled(weight, scale_gain, decoded[0], 1.0, 0.5), c)
        shift = _per_channel(_rescaled(bias, shift_gain, decoded[1], 0.0, 1.0), c)
        rstd = torch.rsqrt(var + how.eps)
        factor = _grouped(scale, groups) * rstd.unsqueeze(2)
        offset = torch.addcmul(_grouped(shift, groups), factor, mean.unsqueeze(2), value=-1)
        y = affine(flat, factor.view(n, c), offset.view(n, c), view.dim)
        ctx.config, ctx.view = config, view
        ctx.save_for_backward(x, *tensors, mean, rstd, scale, moments, hidden, decoded)
        return view.restored(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        inputs, kept = split_saved(ctx.saved_tensors)
        config, view = ctx.config, ctx.view
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return differentiable(config, inputs, grad)
        x, weight, bias, *meta, scale_gain, shift_gain, center, key_scale = inputs
        mean, rstd, scale, moments, hidden, decoded = kept
        flat, g = view.canonical(x), view.canonical(grad)
        n, c = scale.shape
        groups, keys, size, how = config.num_groups, config.num_key_groups, flat.shape[view.dim], config.how
        products, d_shift = _centered_sums(g, flat, mean, rstd, view.dim)
        d_scale = (_grouped(products, groups) * rstd.unsqueeze(2)).view(n, c)
        d_decoded, d_gains = _through_gains(d_scale, d_shift, scale_gain, shift_gain, decoded)
        features = key_features(moments, center, key_scale, how.eps)
        d_features, *d_meta = predict_backward(d_decoded, features, hidden, decoded, tuple(meta))
        d_x = None
        if ctx.needs_input_grad[0]:
            d_var, d_mean = _moment_gradients(d_features, moments, key_scale, how.eps)
            slope, offset = key_slopes(d_var, d_mean, moments[1], c // keys * size, how.unbiased)
            count = c // groups * size
            first = _grouped(scale * d_shift, groups).sum(2) * rstd / count
            second = _grouped(scale * d_scale, groups).sum(2) * rstd.square() / max(count - int(how.unbiased), 1)
            offset = _joined(second * mean - first, offset, c)
            slope = _joined(-second, slope, c)
            factor = (_grouped(scale, groups) * rstd.unsqueeze(2)).view(n, c)
            d_x = view.restored(affine(g, factor, offset, view.dim).addcmul_(flat, slope.unsqueeze(view.dim)))
        d_weight = None if weight is None else d_scale.sum(0).view_as(weight)
        d_bias = None if bias is None else d_shift.sum(0).view_as(bias)
        return d_x, d_weight, d_bias, *d_meta, *d_gains, None, None, None


def _centered_sums(g: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """``sum(g (x - mean_G))`` and ``sum(g)`` of each channel.

    The difference of the sums loses digits where a mean is large against its deviation; then the input is centered
    first, which costs a copy of it. A compiler fuses the centering with the sum.
    """
    channels = g.shape[3 - dim]
    if torch.compiler.is_compiling() or (x.is_cpu and (mean * rstd).abs().amax() > _FAR):
        return channel_sums(g, x - _per_channel(mean, channels).unsqueeze(dim), dim)
    products, sums = channel_sums(g, x, dim)
    return torch.addcmul(products, sums, _per_channel(mean, channels), value=-1), sums


def _bessel(count: int) -> float:
    """By how much the unbiased variance exceeds the biased one; a single value has none."""
    return count / (count - 1) if count > 1 else 1.0


def _through_gains(
    d_scale: Tensor, d_shift: Tensor, scale_gain: Tensor | None, shift_gain: Tensor | None, decoded: Tensor
) -> tuple[Tensor, tuple[Tensor | None, Tensor | None]]:
    """From the gradients of scale and shift ``(N, C)`` to those of the decoded ``(2, N, K)`` and of the gains."""
    _, n, keys = decoded.shape
    d_spread = torch.stack((d_scale / 2, d_shift)).view(2, n, keys, -1)
    if scale_gain is None or shift_gain is None:
        return d_spread.sum(3), (None, None)
    gains = torch.stack((scale_gain, shift_gain)).view(2, 1, keys, -1)
    d_gains = (d_spread * decoded.unsqueeze(3)).sum(1)
    return (d_spread * gains).sum(3), (d_gains[0].view_as(scale_gain), d_gains[1].view_as(shift_gain))


def _moment_gradients(d_features: Tensor, moments: Tensor, scale: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """From gradients of the key features to those of variance and mean: two ``(N, K)``; see :func:`key_features`."""
    if scale is None:
        return d_features[0], d_features[1]
    d_dev, d_mean = d_features / scale.unsqueeze(1)
    return d_dev / (moments[0] + eps).sqrt().mul_(2), d_mean
