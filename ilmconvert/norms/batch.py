r"""Batch Norm and the norms that, like it, apply fixed statistics when they infer.

In evaluation, Batch Norm is an affine map that does not look at the instance::

    y_c = a_c (x_c - mu_c) + beta_c,        a_c = gamma_c / sqrt(var_c + eps)

An instance-level norm standardizes by the instance's own group mean ``m`` and deviation ``s = sqrt(var_g + eps)``
instead. To get ``y_c`` back, its scale and shift have to follow the instance::

    y_c = a_c s x^_c + a_c (m - mu_c) + beta_c

Both are linear in what the predictor can be shown: the deviation and the mean of the group. With one key group for each
norm group, standardized keys and gains, :class:`Batch` sets them up in closed form, without data. The running
statistics say where ``s`` and ``m`` lie (law of total variance over the group's channels)::

    m_0 = mean_c mu_c        s_0^2 = mean_c var_c + var_c(mu_c) + eps

With centers ``s_0, m_0``, scale ``r s_0`` and the predictor passing its features on through ``tanh``::

    weight = a_c s_0                      scale_gain = 2 a_c r s_0
    bias   = a_c (m_0 - mu_c) + beta_c    shift_gain = a_c r s_0

    weight + scale_gain tanh(u_s) / 2  ~  a_c s               u_s = (s - s_0) / (r s_0)
    bias   + shift_gain tanh(u_m)      ~  a_c (m - mu_c) + beta_c

``tanh(u) = u - u^3 / 3 + ...``: the reach ``r`` decides how straight the predictions are, and how far from the center
they saturate. A predictor of another shape stays silent, and the layer starts from the averages.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake

from ilmconvert.nn import ILMNorm
from ilmconvert.nn.functional import Standardization
from ilmconvert.norms.registry import NormHandler, has_act, register
from ilmconvert.norms.spec import NormSpec

__all__ = ["Batch", "is_untrained"]

REACH = 64.0  # in units of the expected deviation; measured in benchmarks/start.py
_SPATIAL = {"BatchNorm2d": 2, "BatchNormAct2d": 2, "FrozenBatchNorm2d": 2, "FrozenBatchNormAct2d": 2, "BatchNorm3d": 3}


def _spatial(module: nn.Module) -> int | None:
    names = [c.__name__ for c in type(module).__mro__]
    return next((n for name in names for known, n in _SPATIAL.items() if name.endswith(known)), None)


@register(
    "torch.nn.modules.batchnorm.BatchNorm1d",
    "torch.nn.modules.batchnorm.BatchNorm2d",
    "torch.nn.modules.batchnorm.BatchNorm3d",
    "torch.nn.modules.batchnorm.SyncBatchNorm",
    "torch.nn.modules.batchnorm._BatchNorm",
    "torchvision.ops.misc.FrozenBatchNorm2d",
    "timm.layers.norm_act.BatchNormAct2d",
    "timm.layers.norm_act.SyncBatchNormAct",
    "timm.layers.norm_act.FrozenBatchNormAct2d",
)
class Batch(NormHandler):
    """``nn.BatchNorm*``, synchronized and frozen ones, and timm's with dropout and activation."""

    family = "batch"
    eps: float | None = None  # where the class writes it into its forward

    def eps_of(self, module: nn.Module) -> float:
        """What is added to the variance."""
        return float(module.eps if self.eps is None else self.eps)  # type: ignore[arg-type]

    def describe(self, module: nn.Module) -> NormSpec:
        """The grouping is left open: it is the user's choice."""
        weight = getattr(module, "weight", None)
        running_mean = getattr(module, "running_mean", None)
        frozen = not isinstance(module, nn.modules.batchnorm._NormBase)  # plain tensor arithmetic
        known = next((t for t in (weight, running_mean) if t is not None), None)
        return NormSpec(
            shape=(int(module.num_features) if known is None else known.numel(),),  # type: ignore[arg-type]
            num_groups=None,
            standardization=Standardization(eps=self.eps_of(module), output="promoted" if frozen else "input"),
            spatial_ndim=_spatial(module),
            has_act=has_act(module),
            preserves=False,
            fixed_statistics=_running(module) is not None,
        )

    def affine(self, module: nn.Module, num_groups: int) -> tuple[Tensor | None, Tensor | None]:
        """Scale and shift that are right on average over the data the running statistics come from."""
        gamma, beta = getattr(module, "weight", None), getattr(module, "bias", None)
        if (known := _statistics(module, num_groups, self.eps_of(module))) is None:
            return gamma, beta
        a, deviation, center, mean = known
        shift = (a * (center - mean)).flatten()
        return (a * deviation).flatten(), shift if beta is None else shift + beta.detach().double()

    @torch.no_grad()
    def set_predictor_(self, module: nn.Module, layer: ILMNorm) -> None:
        """Undo the instance's standardization, where the predictor is shown each norm group's own statistics."""
        predictor, groups = layer.predictor, layer.num_groups
        known = _statistics(module, groups, self.eps_of(module))
        fits = layer.num_key_groups == groups and layer.hidden_features >= 2 * groups
        if known is None or not fits or layer.mode == "paper" or predictor.key_center is None:
            return
        a, deviation, center, _ = known
        largest = (a * deviation).abs().nan_to_num(0.0, 0.0).amax(1, keepdim=True)
        limit = torch.finfo(layer.scale_gain.dtype).max / 4 if layer.scale_gain is not None else math.inf
        reach = deviation * (limit / largest).clamp(max=REACH)  # half precision would not hold every gain
        predictor.detect()
        predictor.key_center.copy_(torch.cat((deviation, center), 1).T)
        predictor.key_scale.copy_(reach.T.expand(2, -1))  # type: ignore[union-attr]
        if layer.scale_gain is not None and layer.shift_gain is not None:
            gain = (a * reach).flatten()
            layer.scale_gain.copy_(2 * gain)
            layer.shift_gain.copy_(gain)


def is_untrained(module: nn.Module) -> bool:
    """Whether running statistics are as before any training; those of meta tensors are not known to be."""
    if (running := _running(module)) is None or running[0].is_meta or is_fake(running[0]):
        return False
    mean, var = running
    return not mean.any() and bool((var == 1).all())


def _running(module: nn.Module) -> tuple[Tensor, Tensor] | None:
    """Running mean and variance, if the norm keeps them."""
    mean, var = getattr(module, "running_mean", None), getattr(module, "running_var", None)
    return (mean, var) if isinstance(mean, Tensor) and isinstance(var, Tensor) else None


def _statistics(module: nn.Module, groups: int, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """The slope ``a``, the group's expected deviation and mean, and the running mean, in float64.

    Slope and running mean are ``(groups, channels)``, deviation and mean ``(groups, 1)``.
    """
    if (running := _running(module)) is None:
        return None
    gamma = getattr(module, "weight", None)
    both = torch.stack(running).detach().double().view(2, groups, -1)
    mean, var = both.unbind()
    a = torch.rsqrt(var + eps)
    a = a if gamma is None else gamma.detach().double().view_as(a) * a
    known = both.isfinite().all(0)  # a broken channel must not spoil the others
    count = known.sum(1, keepdim=True).clamp_min(1)
    center, within = (torch.where(known, both, 0.0).sum(2, keepdim=True) / count).unbind()
    between = torch.where(known, (mean - center).square(), 0.0).sum(1, keepdim=True) / count
    deviation = (within + between + eps).sqrt()
    return a, deviation, center, mean
