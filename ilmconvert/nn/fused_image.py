"""Group, Instance and whole-sample Layer Norm with ILM's rescaling: what a sample's channels share with its positions.

Forward, one pass reads mean and variance of the finest groups that both norm groups and key groups are made of, and
theirs follow by the law of total variance; with what the predictor says, the whole layer is one affine map per instance
and channel::

    y = scale (x - mean_G) / sqrt(var_G + eps) + shift

Backward, one pass reads ``sum(g x^)`` and ``sum(g)`` of each channel, from which all gradients of the parameters
follow, and, with ``r = 1 / sqrt(var_G + eps)`` and ``a``, ``b`` of the key groups (see
:mod:`ilmconvert.nn.gradients`)::

    dx = r scale g + (a - r^2 S2) x + (b - r S1 + r^2 S2 mean_G)

where ``S1`` and ``S2`` are the group's means of ``scale g`` and ``scale g x^``. Saved for backward: the input and what
is per instance and channel or smaller.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ilmconvert.nn.branches import Branches
from ilmconvert.nn.functional import Config, Parameters, halved, key_features
from ilmconvert.nn.gradients import differentiable, split_saved
from ilmconvert.nn.kernels import (
    affine,
    channel_sums,
    group_norm,
    group_norm_backward,
    per_channel,
    small,
    standardizers,
)

__all__ = ["image_ilm_norm"]


def image_ilm_norm(x: Tensor, parameters: Parameters, config: Config) -> Tensor:
    """ILM-Norm in layout ``sample`` of ``(N, C, *)``; contiguous and channels_last inputs keep their memory format."""
    if not x.is_contiguous() and not x.movedim(1, -1).is_contiguous():
        x = x.contiguous()
    if not torch.is_grad_enabled():
        return _image(x, parameters, config)[0]
    return _Image.apply(x, *parameters, config)  # type: ignore[no-any-return]


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
        compiling = torch.compiler.is_compiling()
        if self.dim == 2:
            return torch.ops.aten._unsafe_view(x, self.shape) if compiling else x.resize_(self.shape)
        n, c, *inner = self.shape
        y = x.view(n, *inner, c).movedim(-1, 1)
        return y.clone() if compiling else x.as_strided_(y.shape, y.stride())


def _image(x: Tensor, parameters: Parameters, config: Config) -> tuple[Tensor, bool, bool, tuple[Tensor, ...]]:
    """The forward pass: output, whether :func:`small` and far from zero, and what to keep."""
    weight, bias, *meta, scale_gain, shift_gain, center, key_scale = parameters
    channels, groups, keys, how = x.shape[1], config.num_groups, config.num_key_groups, config.how
    eps: float = how.eps  # type: ignore[assignment]  # there is one, or this path would not serve
    excess = _bessel(x, groups) if how.unbiased else 1.0
    few, far = small(x), True
    if few:
        y, key_mean, key_rstd = group_norm(x, keys, eps / excess)
    else:
        view = _View.of(x)
        flat = view.canonical(x)
        (mean, rstd), (key_mean, key_rstd), far = standardizers(flat, view.dim, groups, keys, eps / excess)
    if how.unbiased:
        var = (key_rstd.pow(-2) - eps / excess) * _bessel(x, keys)
        spread = var if center is None else (var + eps).sqrt()
    else:
        spread = key_rstd.pow(-2) - eps if center is None else key_rstd.reciprocal()
    predicted = Branches.of(key_features(spread, key_mean, center, key_scale), meta)
    for_scale, for_shift = predicted.decoded.unbind()
    scale = _rescaled(weight, scale_gain, for_scale, channels, of_scale=True)
    shift = _rescaled(bias, shift_gain, for_shift, channels, of_scale=False)
    if how.unbiased:  # as a biased variance under another eps, with a smaller scale
        scale = scale / math.sqrt(excess)
    if few and keys == groups:
        mean, rstd = key_mean, key_rstd
        _grouped(y, channels).mul_(_grouped(scale, channels)).add_(_grouped(shift, channels))
    elif few:
        y, mean, rstd = group_norm(x, groups, eps / excess, scale, shift)
    else:
        factor = _grouped(scale, groups) * _grouped(rstd, groups)
        offset = torch.addcmul(_grouped(shift, groups), factor, _grouped(mean, groups), value=-1)
        y = view.restored(affine(flat, factor.reshape(scale.shape), offset.reshape(scale.shape), view.dim))
    kept = mean, rstd, scale, key_mean, spread, *predicted
    return y, few, far, kept


class _Image(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *parameters: Any) -> Tensor:
        *tensors, config = parameters
        y, ctx.few, ctx.far, kept = _image(x, Parameters(*tensors), config)
        ctx.config = config
        ctx.save_for_backward(x, *tensors, *kept)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        inputs, kept = split_saved(ctx.saved_tensors)
        config, few = ctx.config, ctx.few
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return differentiable(config, inputs, grad)
        x, weight, bias, encoder, _, _, scale_gain, shift_gain, _, key_scale = inputs
        mean, rstd, scale, key_mean, spread, *rest = kept
        predicted = Branches(*rest)
        groups, how = config.num_groups, config.how
        if few:
            d_x, products, sums = group_norm_backward(grad.contiguous(), x, scale, mean, rstd)
        else:
            view = _View.of(x)
            flat, g = view.canonical(x), view.canonical(grad)
            products, sums = channel_sums(g, flat, view.dim, mean, rstd, ctx.far)
            factor = _grouped(scale, groups) * _grouped(rstd, groups)
            second, first = ((factor * _grouped(t, groups)).sum(2) for t in (products, sums))
        if how.unbiased:
            products = products / math.sqrt(_bessel(x, groups))
        for_scale, for_shift = predicted.decoded.unbind()
        d_weight, d_scale_gain, d_scale = _own_gradients(products, weight, scale_gain, for_scale, of_scale=True)
        d_bias, d_shift_gain, d_shift = _own_gradients(sums, bias, shift_gain, for_shift, of_scale=False)
        keys, size = config.num_key_groups, x[0].numel()
        d_features, *d_meta = predicted.backward(d_scale, d_shift, encoder, keys / size)
        parameters = d_weight, d_bias, *d_meta, d_scale_gain, d_shift_gain, None, None
        if not ctx.needs_input_grad[0] and not torch.compiler.is_compiling():  # a compiler may know it too early
            return None, *parameters, None
        if key_scale is not None:
            d_features = d_features / key_scale.unsqueeze(1)
        slope, offset = d_features.unbind()
        slope = slope + slope if key_scale is None else slope / spread  # d sqrt(var + eps) = d var / (2 spread)
        if how.unbiased:
            slope = slope * _bessel(x, keys)
        offset = torch.addcmul(offset, slope, key_mean, value=-1)
        if few:
            _grouped(d_x, keys).addcmul_(_grouped(x, keys), _grouped(slope, keys)).add_(_grouped(offset, keys))
            return d_x, *parameters, None
        second = second * rstd * (-groups / size)
        first = torch.addcmul(first * (-groups / size), second, mean, value=-1)
        d_x = affine(g, factor.reshape(scale.shape), _joined(first, offset, x.shape[1]), view.dim)
        d_x.addcmul_(flat, _joined(second, slope, x.shape[1]).unsqueeze(view.dim))
        return view.restored(d_x), *parameters, None


def _grouped(value: Tensor, groups: int) -> Tensor:
    """``(N, C)`` as ``(N, groups, C / groups)``, and ``(N, C, *)`` likewise."""
    return value.view(value.shape[0], groups, -1)


def _bessel(x: Tensor, groups: int) -> float:
    """By how much the unbiased variance of a group exceeds the biased one; a single value has none."""
    count = x[0].numel() // groups
    return count / (count - 1) if count > 1 else 1.0


def _over(value: Tensor, channels: int) -> Tensor:
    """``(N, K)`` so that it meets ``(C,)``."""
    return value if value.shape[1] in (1, channels) else per_channel(value, channels)


def _rescaled(own: Tensor | None, gain: Tensor | None, decoded: Tensor, channels: int, *, of_scale: bool) -> Tensor:
    """``own + gain * prediction`` per instance and channel: ``(N, C)``; a scale's prediction is half of decoded."""
    decoded, factor = _over(decoded, channels), 0.5 if of_scale else 1.0
    own = decoded.new_full((channels,), float(of_scale)) if own is None else own
    if gain is None:
        return torch.add(own, decoded, alpha=factor)
    return torch.addcmul(own, gain, decoded, value=factor)


def _own_gradients(
    total: Tensor, own: Tensor | None, gain: Tensor | None, decoded: Tensor, *, of_scale: bool
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """From the gradient of scale or shift, ``(N, C)``, to those of weight or bias, gain, and decoded, ``(N, K)``."""
    keys, channels = decoded.shape[1], total.shape[1]
    d_own = None if own is None else total.sum(0)
    if of_scale:
        total = halved(total)
    if gain is None:
        return d_own, None, _grouped(total, keys).sum(2)
    return d_own, (total * _over(decoded, channels)).sum(0), _grouped(total * gain, keys).sum(2)


def _joined(first: Tensor, second: Tensor, channels: int) -> Tensor:
    """The sum of two ``(N, groups)`` of different groupings, as ``(N, C)``."""
    if first.shape == second.shape:
        return per_channel(first + second, channels)
    return per_channel(first, channels) + per_channel(second, channels)
