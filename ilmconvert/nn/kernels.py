"""The passes over memory that the fused paths make, each by the torch kernel that makes it fastest.

A tensor is seen as ``(N, C, S)`` (``dim`` 2: contiguous) or ``(N, S, C)`` (``dim`` 1: channels_last), ``dim`` being
the one of the ``S`` positions. Sums and moments are ``(N, groups)``, of groups of channels and their positions.

On the CPU, a backward kernel is the fastest reduction torch has: asked for the gradients of scale and shift alone, it
returns ``sum(g x^)`` and ``sum(g)`` from one pass over both. With the channels of all samples taken for those of one,
it takes a scale per instance and channel, and Batch Norm's evaluation is the fastest affine map. Under torch.compile
all of them are written as plain arithmetic, which inductor fuses.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "Moments",
    "affine",
    "channel_sums",
    "group_norm",
    "group_norm_backward",
    "moments",
    "per_channel",
    "row_sums",
    "small",
    "standardizers",
]

_OFFSET = 16.0  # mean^2 / variance from which on a variance by E[x^2] - E[x]^2 is not taken
_FAR = 4096.0  # mean^2 / variance, summed, from which on the sums of a backward pass are taken of the centered input
_LONG = 4096  # values of a group from which on they are summed channel by channel: in parallel, and rounding less
_SMALL = 2**20  # values of a tensor up to which a pass over it is cheaper than another kind of operation

_norm_backward = torch.ops.aten.native_group_norm_backward.default
_token_backward = torch.ops.aten.native_layer_norm_backward.default

_Pair = tuple[Tensor, Tensor]


class Moments(NamedTuple):
    """Mean and (biased) variance of each group, and whether any may lie far from zero against its deviation."""

    mean: Tensor
    var: Tensor
    far: bool


def _by_kernels(x: Tensor, dim: int) -> bool:
    return x.is_cpu and x.shape[dim] > 1 and not torch.compiler.is_compiling()


def small(x: Tensor) -> bool:
    """Whether Group Norm's kernels serve a ``(N, C, *)`` best: more passes over memory, fewer kinds of operations."""
    if torch.compiler.is_compiling() or not x.is_cpu or not x.is_contiguous():
        return False
    n, c = x.shape[:2]
    return n * c < x.numel() <= _SMALL


def _far(mean: Tensor, rstd: Tensor) -> bool:
    """Or there is a NaN among them, whose loss of digits the other instances must not share."""
    ratio = mean * rstd
    return not (ratio * ratio).sum().item() <= _FAR


def group_norm(
    x: Tensor, groups: int, eps: float, scale: Tensor | None = None, shift: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """``scale x^ + shift`` of a small ``(N, C, *)``, both per instance and channel, and :func:`standardizers`."""
    n, rows = x.shape[0], x.shape[0] * x.shape[1]
    weight, bias = (None if t is None else t.view(rows) for t in (scale, shift))
    y, mean, rstd = torch.native_group_norm(x, weight, bias, 1, rows, x.numel() // rows, n * groups, eps)
    return y, mean.view(n, groups), rstd.view(n, groups)


def group_norm_backward(
    g: Tensor, x: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of a small ``(N, C, *)`` from that of ``scale x^``, and :func:`channel_sums`.

    Where a mean is large against its deviation the kernel's sums would lose digits; the input is centered first then.
    """
    n, groups = mean.shape
    rows = scale.numel()
    if _far(mean, rstd):
        x, mean = (x.view(n, groups, -1) - mean.unsqueeze(2)).view(g.shape), mean - mean
    d_x, products, sums = _norm_backward(
        g, x, mean, rstd, scale, 1, rows, x.numel() // rows, n * groups, [True, True, True]
    )
    return d_x, products.view(scale.shape), sums.view(scale.shape)


def standardizers(x: Tensor, dim: int, groups: int, keys: int, eps: float) -> tuple[_Pair, _Pair, bool]:
    """Mean and ``1 / sqrt(var + eps)`` of the norm groups and of the key groups, and :attr:`Moments.far`."""
    mean, var, far = moments(x, dim, math.lcm(groups, keys))

    def of(count: int) -> _Pair:
        center, spread = _coarser(mean, var, count)
        return center, torch.rsqrt(spread + eps)

    own = of(groups)
    return own, own if keys == groups else of(keys), far


def moments(x: Tensor, dim: int, groups: int) -> Moments:
    """Of each group: two ``(N, groups)``."""
    if torch.compiler.is_compiling():
        return Moments(*_coarser(*_pivoted(x, dim), groups), True)
    if not x.is_cpu:  # a look at the values would wait for the device
        var, mean = torch.var_mean(x, dim, correction=0)
        return Moments(*_coarser(mean, var, groups), False)
    n = len(x)
    if x.shape[dim] == 1:
        values = x.view(n, -1)
        return Moments(*_coarser(values, torch.zeros_like(values), groups), True)
    count = x.numel() // (n * groups)
    var, mean = (total.mul_(1 / count) for total in _group_sums(x, dim, groups))
    var.addcmul_(mean, mean, value=-1)
    far = not torch.addcmul(var, mean, mean, value=-1 / _OFFSET).amin().item() >= 0  # or a NaN
    if far:
        _recount_(x, dim, mean, var)
    return Moments(mean, var, far)


def _group_sums(x: Tensor, dim: int, groups: int) -> tuple[Tensor, Tensor]:
    """``sum(x^2)`` and ``sum(x)`` of each group: two ``(N, groups)``."""
    n = len(x)
    if dim == 1:
        pieces, sums = x.shape[2], _column_sums(x, x)
    else:
        pieces = groups if x.numel() < _LONG * groups * n else x.shape[1]
        rows = x.view(1, n * pieces, -1)
        sums = row_sums(rows, rows, x.new_zeros(1, 1), x.new_ones(1, 1))
    if pieces == groups:
        return sums[0].view(n, groups), sums[1].view(n, groups)
    return sums[0].view(n, groups, -1).sum(2), sums[1].view(n, groups, -1).sum(2)


def row_sums(g: Tensor, x: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """``rstd sum(g (x - mean))`` and ``sum(g)`` of each row of ``(1, R, S)``, in one pass.

    They are what Group Norm's backward returns for scale and shift, a row being a channel; ``mean`` and ``rstd`` are
    ``(1, groups)``, of groups of rows.
    """
    unused = x.new_empty(x.shape[1])  # the scale, which older versions of torch want to see
    _, products, sums = _norm_backward(g, x, mean, rstd, unused, *x.shape, mean.shape[1], [False, True, True])
    return products, sums


def _column_sums(g: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """``sum(g x)`` and ``sum(g)`` of each channel of ``(N, S, C)``: two ``(N, C)``."""
    _, size, c = x.shape
    mean, rstd, weight = x.new_zeros(size, 1), x.new_ones(size, 1), x.new_empty(c)
    found = [
        _token_backward(own, sample, (c,), mean, rstd, weight, weight, [False, True, True])[1:]
        for own, sample in zip(g.unbind(), x.unbind(), strict=True)
    ]
    products, sums = zip(*found, strict=True)
    return torch.stack(products), torch.stack(sums)


def _recount_(x: Tensor, dim: int, mean: Tensor, var: Tensor) -> None:
    """Take anew what a difference of squares lost: the moments of groups far from zero, of their deviations."""
    n, groups = mean.shape
    far = var * _OFFSET < mean.square()
    rows = x.view(n, groups, -1) if dim == 2 else x.transpose(1, 2).reshape(n, groups, -1)
    rows = rows[far] - mean[far].unsqueeze(1)
    rest = rows.mean(1)
    mean[far] += rest
    var[far] = torch.linalg.vector_norm(rows, dim=1).square_().div_(rows.shape[1]).sub_(rest.square())


def _pivoted(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Mean and variance of each channel from one pass over the deviations from one of its values.

    Without a pivot, the difference of squares would lose digits where the mean is large against the deviation. With an
    outlier for a pivot too: so it is the middle one of three, and none from a border, which may be masked or padded.
    """
    size = x.shape[dim]
    first, second, third = (x.narrow(dim, size * quarter // 4, 1) for quarter in (1, 2, 3))
    pivot = torch.maximum(torch.minimum(first, second), torch.minimum(torch.maximum(first, second), third))
    deviation = x - pivot
    mean, power = deviation.mean(dim), deviation.square().mean(dim)
    return mean + pivot.squeeze(dim), (power - mean.square()).clamp_min(0)


def _coarser(mean: Tensor, var: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Mean and (biased) variance of groups from those of finer groups (law of total variance)."""
    n, finer = mean.shape
    if groups == finer:
        return mean, var
    spread, center = torch.var_mean(mean.view(n, groups, -1), 2, correction=0)
    return center, var.view(n, groups, -1).mean(2) + spread


def affine(x: Tensor, factor: Tensor, offset: Tensor, dim: int) -> Tensor:
    """``factor x + offset`` as a fresh tensor, both per instance and channel: ``(N, C)``."""
    if dim == 1 or not _by_kernels(x, dim):
        return torch.addcmul(offset.unsqueeze(dim), x, factor.unsqueeze(dim))
    rows = factor.numel()
    none, one = x.new_zeros(rows), x.new_ones(rows)
    flat, factor, offset = x.view(1, rows, -1), factor.reshape(rows), offset.reshape(rows)
    return torch.native_batch_norm(flat, factor, offset, none, one, False, 0.0, 0.0)[0].resize_(x.shape)


def channel_sums(g: Tensor, x: Tensor, dim: int, mean: Tensor, rstd: Tensor, far: bool) -> tuple[Tensor, Tensor]:
    """``sum(g x^)`` and ``sum(g)`` of each channel: two ``(N, C)``.

    The difference of sums that the kernels make loses digits where a mean is large against its deviation; then the
    input is centered first, which costs a copy of it. A compiler fuses the centering with the sum.

    Args:
        g, x: the tensors.
        dim: where their positions are.
        mean, rstd: what ``x^`` is made with, ``(N, groups)``.
        far: whether some mean may be so large.
    """
    n, groups = mean.shape
    channels = x.shape[3 - dim]
    centered = far and (torch.compiler.is_compiling() or _far(mean, rstd))
    if centered:
        center = mean.unsqueeze(2) if dim == 2 else per_channel(mean, channels).unsqueeze(1)
        x = (x.view(n, groups, -1) - center).view_as(x) if dim == 2 else x - center
        mean = torch.zeros_like(mean)
    if dim == 2 and _by_kernels(x, dim):
        rows = (1, n * channels, x.shape[2])
        products, sums = row_sums(g.view(rows), x.view(rows), mean.view(1, -1), rstd.view(1, -1))
        return products.view(n, channels), sums.view(n, channels)
    products, sums = _column_sums(g, x) if dim == 1 and _by_kernels(x, dim) else ((g * x).sum(dim), g.sum(dim))
    if not centered:
        products = torch.addcmul(products, sums, per_channel(mean, channels), value=-1)
    return products * per_channel(rstd, channels), sums


def per_channel(value: Tensor, channels: int) -> Tensor:
    """``(..., groups)`` as ``(..., C)``."""
    width = channels // value.shape[-1]
    return value if width == 1 else value.unsqueeze(-1).expand(*value.shape, width).reshape(*value.shape[:-1], channels)
