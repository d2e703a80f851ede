"""The passes over memory that the fused paths make, each by the torch kernel that makes it fastest.

A tensor is seen as ``(N, C, S)`` (``dim`` 2: contiguous) or ``(N, S, C)`` (``dim`` 1: channels_last), ``dim`` being
the one of the ``S`` positions. Sums and moments are ``(N, groups)``, of groups of channels and their positions.

On the CPU, a backward kernel is the fastest reduction torch has: asked for the gradients of scale and shift alone, with
mean 0 and deviation 1, it returns ``sum(g x)`` and ``sum(g)`` from one pass over both; and Batch Norm's evaluation is
the fastest affine map. Under torch.compile all of them are written as plain arithmetic, which inductor fuses.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["affine", "coarser", "group_sums", "moments", "per_channel"]

_OFFSET = 16.0  # mean^2 / variance from which on a variance by E[x^2] - E[x]^2 is not taken
_LONG = 4096  # values of a group from which on they are summed channel by channel: in parallel, and rounding less


def group_sums(g: Tensor, x: Tensor, dim: int, groups: int) -> tuple[Tensor, Tensor]:
    """``sum(g x)`` and ``sum(g)`` of each group: two ``(N, groups)``."""
    n = len(x)
    if torch.compiler.is_compiling() or not x.is_cpu or x.shape[dim] == 1:
        return tuple(t.sum(dim).view(n, groups, -1).sum(2) for t in (g * x, g))  # type: ignore[return-value]
    if dim == 2:
        pieces = groups if x.numel() < _LONG * groups * n else x.shape[1]
        sums = _row_sums(g.view(n, pieces, -1), x.view(n, pieces, -1))
    else:
        pieces, sums = x.shape[2], _column_sums(g, x)
    return sums if groups == pieces else tuple(t.view(n, groups, -1).sum(2) for t in sums)  # type: ignore[return-value]


def _row_sums(g: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    n, rows, size = x.shape
    flat = (1, n * rows, size)
    _, products, sums = torch.ops.aten.native_group_norm_backward(
        g.view(flat), x.view(flat), x.new_zeros(1, 1), x.new_ones(1, 1), None, *flat, 1, [False, True, True]
    )
    return products.view(n, rows), sums.view(n, rows)


def _column_sums(g: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    _, size, c = x.shape
    mean, rstd, weight = x.new_zeros(size, 1), x.new_ones(size, 1), x.new_empty(c)
    kernel = torch.ops.aten.native_layer_norm_backward
    found = [
        kernel(own, sample, (c,), mean, rstd, weight, weight, [False, True, True])[1:]
        for own, sample in zip(g.unbind(), x.unbind(), strict=True)
    ]
    products, sums = zip(*found, strict=True)
    return torch.stack(products), torch.stack(sums)


def moments(x: Tensor, dim: int, groups: int) -> tuple[Tensor, Tensor]:
    """Mean and (biased) variance of each group: two ``(N, groups)``."""
    if torch.compiler.is_compiling():
        return coarser(*_pivoted(x, dim), groups)
    if not x.is_cpu:  # a look at the values would wait for the device
        var, mean = torch.var_mean(x, dim, correction=0)
        return coarser(mean, var, groups)
    if x.shape[dim] == 1:
        mean = x.squeeze(dim)
        return coarser(mean, torch.zeros_like(mean), groups)
    count = x.numel() // (len(x) * groups)
    var, mean = (total.mul_(1 / count) for total in group_sums(x, x, dim, groups))
    var.addcmul_(mean, mean, value=-1)
    if torch.addcmul(var, mean, mean, value=-1 / _OFFSET).amin().item() < 0:
        _recount_(x, dim, mean, var)
    return mean, var


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
    """Mean and variance of each channel from one pass over the deviations from its first value.

    Without a pivot, the difference of squares would lose digits where the mean is large against the deviation.
    """
    pivot = x.narrow(dim, 0, 1)
    deviation = x - pivot
    mean, power = deviation.mean(dim), deviation.square().mean(dim)
    return mean + pivot.squeeze(dim), (power - mean.square()).clamp_min(0)


def coarser(mean: Tensor, var: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Mean and (biased) variance of groups from those of finer groups (law of total variance)."""
    n, finer = mean.shape
    if groups == finer:
        return mean, var
    spread, center = torch.var_mean(mean.view(n, groups, -1), 2, correction=0)
    return center, var.view(n, groups, -1).mean(2) + spread


def affine(x: Tensor, scale: Tensor, shift: Tensor, dim: int, mean: Tensor, var: Tensor, eps: float) -> Tensor:
    """``scale (x - mean) / sqrt(var + eps) + shift`` as a fresh tensor.

    Args:
        x: the tensor.
        scale, shift: per instance and channel, ``(N, C)``.
        dim: where its positions are.
        mean, var: ``(N, groups)``.
        eps: added to the variance.
    """
    if dim == 1 or x.shape[2] == 1 or torch.compiler.is_compiling() or not x.is_cpu:
        grouped = (len(x), mean.shape[1], -1)
        factor = scale.view(grouped) * torch.rsqrt(var + eps).unsqueeze(2)
        offset = torch.addcmul(shift.view(grouped), factor, mean.unsqueeze(2), value=-1)
        return torch.addcmul(offset.view_as(shift).unsqueeze(dim), x, factor.view_as(scale).unsqueeze(dim))
    rows = scale.numel()
    center, spread = (per_channel(t, scale.shape[1]).reshape(rows) for t in (mean, var))
    flat = x.view(1, rows, -1)
    return torch.native_batch_norm(flat, scale.reshape(rows), shift.reshape(rows), center, spread, False, 0.0, eps)[
        0
    ].view(x.shape)


def per_channel(value: Tensor, channels: int) -> Tensor:
    """``(..., groups)`` as ``(..., C)``."""
    width = channels // value.shape[-1]
    return value if width == 1 else value.unsqueeze(-1).expand(*value.shape, width).reshape(*value.shape[:-1], channels)
