"""The passes over memory that the fused paths make, each by the torch kernel that makes it fastest.

A tensor is seen as ``(N, C, S)`` (``dim`` 2: contiguous) or ``(N, S, C)`` (``dim`` 1: channels_last), ``dim`` being
the one of the ``S`` positions. What is per instance and channel is ``(N, C)``.

On the CPU, a backward kernel is the fastest reduction torch has: asked for the gradients of scale and shift alone, with
mean 0 and deviation 1, it returns ``sum(g x)`` and ``sum(g)`` from one pass over both; and Batch Norm's evaluation is
the fastest affine map. Under torch.compile all of them are written as plain arithmetic, which inductor fuses.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["affine", "channel_moments", "channel_sums", "group_moments_of"]

_OFFSET = 16.0  # mean^2 / variance from which on a variance by E[x^2] - E[x]^2 is not taken
_LONG = 1024  # positions from which on torch's own reductions are as fast, and sum in cascades


def channel_sums(g: Tensor, x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """``sum(g x)`` and ``sum(g)`` over ``dim``: two ``(N, C)``."""
    if torch.compiler.is_compiling() or not x.is_cpu or x.shape[dim] == 1:
        return (g * x).sum(dim), g.sum(dim)
    return _row_sums(g, x) if dim == 2 else _column_sums(g, x)


def _row_sums(g: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    n, c, size = x.shape
    flat = (1, n * c, size)
    _, products, sums = torch.ops.aten.native_group_norm_backward(
        g.view(flat), x.view(flat), x.new_zeros(1, 1), x.new_ones(1, 1), None, *flat, 1, [False, True, True]
    )
    return products.view(n, c), sums.view(n, c)


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


def channel_moments(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Mean and (biased) variance of each channel of each instance: two ``(N, C)``."""
    if torch.compiler.is_compiling():
        return _pivoted_moments(x, dim)
    count = x.shape[dim]
    if count == 1:
        mean = x.squeeze(dim)
        return mean, torch.zeros_like(mean)
    if not x.is_cpu:  # a look at the values would wait for the device
        var, mean = torch.var_mean(x, dim, correction=0)
        return mean, var
    if dim == 2 and count >= _LONG:
        mean, var = x.mean(2), torch.linalg.vector_norm(x, dim=2).square_().div_(count)
    else:
        var, mean = (total.div_(count) for total in channel_sums(x, x, dim))
    var.addcmul_(mean, mean, value=-1)
    excess = torch.addcmul(var, mean, mean, value=-1 / _OFFSET)
    if excess.amin() < 0:
        lossy = excess < 0
        rows = (x if dim == 2 else x.transpose(1, 2))[lossy]
        rows.sub_(mean[lossy].unsqueeze(1))
        rest = rows.mean(1)
        mean[lossy] += rest
        var[lossy] = torch.linalg.vector_norm(rows, dim=1).square_().div_(count).sub_(rest.square())
    return mean, var


def _pivoted_moments(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """As :func:`channel_moments`, from one pass over the deviations from each channel's first value.

    Without a pivot, the difference of squares would lose digits where the mean is large against the deviation.
    """
    pivot = x.narrow(dim, 0, 1)
    deviation = x - pivot
    mean, power = deviation.mean(dim), deviation.square().mean(dim)
    return mean + pivot.squeeze(dim), (power - mean.square()).clamp_min(0)


def group_moments_of(mean: Tensor, var: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Mean and (biased) variance of groups of channels from those of the channels (law of total variance)."""
    n, c = mean.shape
    if groups == c:
        return mean, var
    spread, center = torch.var_mean(mean.view(n, groups, -1), 2, correction=0)
    return center, var.view(n, groups, -1).mean(2) + spread


def affine(x: Tensor, scale: Tensor, shift: Tensor, dim: int) -> Tensor:
    """``scale x + shift`` per instance and channel, both ``(N, C)``; a fresh tensor."""
    if dim == 1 or x.shape[2] == 1 or torch.compiler.is_compiling() or not x.is_cpu:
        return torch.addcmul(shift.unsqueeze(dim), x, scale.unsqueeze(dim))
    rows = x.shape[0] * x.shape[1]
    flat, still = x.view(1, rows, -1), (x.new_zeros(rows), x.new_ones(rows))
    return torch.native_batch_norm(flat, scale.reshape(-1), shift.reshape(-1), *still, False, 0.0, 0.0)[0].view(x.shape)
