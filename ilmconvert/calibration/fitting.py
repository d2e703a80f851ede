r"""Fit one ILM layer to what the norm it replaced gives out: least squares for each channel, in closed form.

With the predictor fixed, a layer is linear in what it learns per channel. For an instance ``n`` and a position ``s``::

    y = B_w x^ + g_w (D_w x^) + g_b D_b + B_b         D_w(n), D_b(n): the predictions for the channel's key group

so the parameters that bring ``y`` closest to a target ``t`` solve four normal equations per channel. Since ``D_w`` and
``D_b`` are constant within an instance, :class:`Samples` keeps five sums per instance and channel, from which the
equations follow for any predictor; nothing of the size of a feature map is kept. All sums are in float64 and add up
over batches and processes, so the result does not depend on how the images are cut.

The fit is pulled towards where the layer starts, by a share of each column's own energy: a column that the data say
nothing of (a dead channel, a single image) stays.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ilmconvert.errors import ModelError
from ilmconvert.nn import ILMNorm
from ilmconvert.nn.functional import canonical, group_moments, key_features, predict, standardize
from ilmconvert.processes import summed

__all__ = ["RIDGE", "Fit", "Samples", "bare_norm", "fit_"]

RIDGE = 1e-6  # share of a column's energy; measured in benchmarks/calibration.py
_TINY = 1e-12
_AT_ONCE = 1 << 20  # values that are widened to float64 together
_SPREADS = 16.0  # deviations that a standardized key's scale is wide
_ROUNDING = 1e-6  # share of the variance that float32 cannot tell; a channel that misses no more is left alone


def bare_norm(norm: nn.Module) -> nn.Module:
    """The norm without hooks, dropout and activation, sharing its tensors."""
    bare = copy.copy(norm)
    bare._modules = {name: nn.Identity() for name in norm._modules}
    for name in ("_forward_hooks", "_forward_pre_hooks"):
        setattr(bare, name, type(getattr(norm, name))())
    return bare


@dataclass
class Samples:
    """Sums over the positions of each instance: ``(instances, C)`` each, float64, in one list entry per batch.

    Attributes:
        moments: variance and mean of each key group, ``(2, instances, K)``.
        sums: of ``x^``, ``x^ x^``, ``x^ t``, ``t``, ``t t``.
        size: positions of each instance in the batch.
    """

    moments: list[Tensor] = field(default_factory=list)
    sums: list[Tensor] = field(default_factory=list)
    size: list[Tensor] = field(default_factory=list)

    @torch.no_grad()
    def add(self, layer: ILMNorm, x: Tensor, target: Tensor) -> None:
        """Take in a batch.

        Args:
            layer: the ILM layer, for its grouping.
            x: its input.
            target: what it should give out for that.
        """
        how, shape = layer.standardization, layer.normalized_shape
        if x.ndim == how.unbatched_ndim:
            x, target = x.unsqueeze(0), target.unsqueeze(0)
        x, target = (v.to(torch.promote_types(v.dtype, torch.float32)) for v in (x, target))
        flat, t = canonical(x, how.layout, shape), canonical(target, how.layout, shape)
        z = canonical(standardize(x, shape, layer.num_groups, how), how.layout, shape)
        mean, var = (m.reshape(len(flat), -1) for m in group_moments(flat, layer.num_key_groups, how))
        self.moments.append(torch.stack((var, mean)).double())
        self.sums.append(_sums(z, t))
        self.size.append(torch.full((len(flat), 1), flat.shape[2], dtype=torch.float64, device=x.device))

    def together(self) -> tuple[Tensor, Tensor, Tensor]:
        """Moments ``(2, A, K)``, sums ``(5, A, C)`` and sizes ``(A, 1)`` of all instances."""
        return torch.cat(self.moments, 1), torch.cat(self.sums, 1), torch.cat(self.size)


def _sums(z: Tensor, t: Tensor) -> Tensor:
    """Products in float64 too, few instances at a time: in float32 a constant target would seem to vary."""
    parts = []
    few = max(_AT_ONCE // (z.shape[1:].numel() or 1), 1)
    for a, b in zip(z.split(few), t.split(few), strict=True):
        a, b = a.double(), b.double()
        parts.append(torch.stack([v.sum(2) for v in (a, a * a, a * b, b, b * b)]))
    return torch.cat(parts, 1)


@dataclass(frozen=True)
class Fit:
    """How well a layer follows its target, before and after.

    Attributes:
        images: instances seen, of all processes.
        explained_before, explained_after: share of the target's variance (over instances and positions, all channels
            together) that the layer's output explains; at most 1. Of a target that does not vary it is the share of its
            mean square, or of that of a standardized input if the target is smaller.
        degenerate: channels whose input hardly varies; they keep their start.
    """

    images: int
    explained_before: float
    explained_after: float
    degenerate: tuple[int, ...]


@torch.no_grad()
def fit_(layer: ILMNorm, samples: Samples, *, ridge: float = RIDGE) -> Fit:
    """Fit weight, bias and gains of ``layer``, in place.

    A silent predictor is set to detect first, with centers and scales from the samples (:func:`_detect_`).

    Args:
        layer: the layer; without gains, weight and bias alone are fitted.
        samples: of this process; sums are added up over all processes where ``torch.distributed`` runs.
        ridge: pull towards the start, as a share of each column's energy.

    Raises:
        ModelError: activations that are not finite.
    """
    moments, sums, size = samples.together()
    start = _coefficients(layer)
    if layer.scale_gain is not None and not layer.predictor.scale_decoder.weight.any():
        _detect_(layer, moments)
        start[:, 1:3] = 0
    equations, right, energy = _normal_equations(layer, moments, sums, size)
    if not (equations.isfinite().all() and right.isfinite().all()):
        raise ModelError("expected finite activations to fit a layer to, got others")
    count = summed(torch.tensor(float(len(size)), dtype=torch.float64, device=size.device))
    active = [i for i, column in enumerate(_columns(layer)) if column is not None]
    positions = equations[:, 3, 3].clamp_min(1)
    spread = energy - right[:, 3] ** 2 / positions

    def missed(theta: Tensor) -> Tensor:
        quadratic = torch.einsum("ci,cij,cj->c", theta, equations, theta)
        return (energy - 2 * (theta * right).sum(1) + quadratic).clamp_min(0)

    flat = equations[:, 0, 0] <= _TINY * positions
    solution = _solve(equations, right, start, active, ridge)
    keeps = (
        flat | (missed(start) <= torch.maximum(_ROUNDING * spread, _TINY * energy)) | ~torch.isfinite(solution).all(1)
    )
    solution[keeps] = start[keeps]
    _set_(layer, solution.T)
    varies = spread.sum() > _TINY * energy.sum()
    whole = (spread if varies else torch.maximum(energy, positions)).sum()
    shares = [float(1 - missed(theta).sum() / whole) for theta in (start, solution)]
    return Fit(int(count), shares[0], shares[1], tuple(int(i) for i in flat.nonzero().flatten()))


def _columns(layer: ILMNorm) -> tuple[Tensor | None, ...]:
    """The parameters that are fitted; None where the layer has none."""
    return layer.weight, layer.scale_gain, layer.shift_gain, layer.bias


def _coefficients(layer: ILMNorm) -> Tensor:
    """``B_w, g_w, g_b, B_b`` of each channel: ``(C, 4)``, float64."""
    weight = layer.predictor.encoder.weight
    columns = _columns(layer)
    defaults = (1.0, 1.0, 1.0, 0.0)
    shape = (layer.num_channels,)
    return torch.stack(
        [
            weight.new_full(shape, value, dtype=torch.float64) if column is None else column.double().reshape(shape)
            for column, value in zip(columns, defaults, strict=True)
        ],
        1,
    )


def _set_(layer: ILMNorm, solution: Tensor) -> None:
    for column, value in zip(_columns(layer), solution, strict=True):
        if column is not None:
            column.copy_(value.reshape(column.shape))


def _predictions(layer: ILMNorm, moments: Tensor) -> tuple[Tensor, Tensor]:
    """``D_w - 1/2`` and ``D_b`` for each instance and channel: ``(A, C)`` each, float64."""
    predictor = layer.predictor
    center, scale = (None if v is None else v.double() for v in (predictor.key_center, predictor.key_scale))
    spread = moments[0] if center is None else (moments[0] + (layer.eps or 0.0)).sqrt()
    features = key_features(spread, moments[1], center, scale)
    d_scale, d_shift = predict(features, [w.double() for w in predictor.weights()])
    size = layer.num_channels // layer.num_key_groups
    return d_scale.repeat_interleave(size, 1), d_shift.repeat_interleave(size, 1)


def _normal_equations(layer: ILMNorm, moments: Tensor, sums: Tensor, size: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Matrix ``(C, 4, 4)``, right side ``(C, 4)`` and energy of the target ``(C,)``, of all processes."""
    z, zz, zt, t, tt = sums
    p, q = _predictions(layer, moments)
    size = size.expand_as(z)
    upper = {
        (0, 0): zz,
        (0, 1): p * zz,
        (0, 2): q * z,
        (0, 3): z,
        (1, 1): p * p * zz,
        (1, 2): p * q * z,
        (1, 3): p * z,
        (2, 2): q * q * size,
        (2, 3): q * size,
        (3, 3): size,
    }
    equations = z.new_zeros(z.shape[1], 4, 4)
    for (i, j), value in upper.items():
        equations[:, i, j] = equations[:, j, i] = value.sum(0)
    right = torch.stack([v.sum(0) for v in (zt, p * zt, q * t, t)], 1)
    return summed(equations), summed(right), summed(tt.sum(0))


def _solve(equations: Tensor, right: Tensor, start: Tensor, active: list[int], ridge: float) -> Tensor:
    """The start, with the active columns moved to the least squares of what it leaves."""
    left = equations[:, active][:, :, active]
    residual = (right - torch.einsum("cij,cj->ci", equations, start))[:, active]
    energy = left.diagonal(dim1=1, dim2=2)
    unit = energy.clamp_min(_TINY).rsqrt()  # columns of equal length: gains and shifts differ by orders of magnitude
    scaled = left * unit[:, :, None] * unit[:, None, :]
    scaled = scaled + ridge * torch.eye(len(active), dtype=left.dtype, device=left.device)
    step = (torch.linalg.pinv(scaled, hermitian=True) @ (residual * unit).unsqueeze(2)).squeeze(2) * unit
    solution = start.clone()
    solution[:, active] += step
    return solution


def _detect_(layer: ILMNorm, moments: Tensor) -> None:
    """Let a silent predictor detect scale and shift, from the moments over the samples.

    With standardized keys, centers are the means and scales several deviations wide. Without, the scale is detected
    where the sigmoid has a square root's curvature: ``sigmoid(w s / mean s)``, ``w tanh(w / 2) = 1/2``, ``w = 1.04``;
    the shift on the straight part of the tanh, by a slope of 0.15 over two deviations. A narrow embedding carries the
    mean over all key groups.
    """
    predictor = layer.predictor
    if predictor.key_center is not None and predictor.key_scale is not None:
        shown = torch.stack(((moments[0] + (layer.eps or 0.0)).sqrt(), moments[1]))
        mean, std = _mean_and_std(shown)
        predictor.key_center.copy_(mean)
        predictor.key_scale.copy_(_SPREADS * torch.maximum(std, 1e-3 * mean.abs()).clamp_min(1e-6))
        scale_slope, shift_slope = mean.new_full((), 2.0), mean.new_full((), 1.0)
    else:
        mean, std = _mean_and_std(moments)
        scale_slope = 1.04 / mean[0].clamp_min(1e-6)
        shift_slope = 0.15 / (2 * std[1]).clamp_min(1e-6)
    keys, hidden = layer.num_key_groups, layer.hidden_features
    if hidden >= 2 * keys:
        predictor.detect()
        scales, shifts = scale_slope / 2, shift_slope
        predictor.scale_decoder.weight.mul_(scales.reshape(-1, 1))
        predictor.shift_decoder.weight.mul_(shifts.reshape(-1, 1))
    elif predictor.num_blocks == 1 and hidden >= 2:
        predictor.silence()
        signs = mean.new_tensor([1.0, -1.0])
        predictor.encoder.weight[:2] = signs.unsqueeze(1) / keys
        predictor.scale_decoder.weight[:, :2] = scale_slope.mean() * signs
        predictor.shift_decoder.weight[:, :2] = shift_slope.mean() * signs


def _mean_and_std(values: Tensor) -> tuple[Tensor, Tensor]:
    """Over the instances of all processes: ``(2, A, K)`` to ``(2, K)`` each."""
    ones = torch.ones_like(values)
    count, total, square = (summed(v.sum(1)) for v in (ones, values, values * values))
    mean = total / count
    return mean, (square / count - mean * mean).clamp_min(0).sqrt()
