r"""Batch Norm and the norms that, like it, apply fixed statistics when they infer.

In evaluation, Batch Norm is an affine map that does not look at the instance::

    y_c = a_c (x_c - mu_c) + beta_c,        a_c = gamma_c / sqrt(var_c + eps)

An instance-level norm standardizes by the instance's own group mean ``mu_g`` and deviation ``sigma_g`` instead, so::

    y_c = a_c sigma_g x^_c + a_c (mu_g - mu_c) + beta_c

No constant scale and shift can reproduce that, since ``sigma_g`` and ``mu_g`` vary. :meth:`Batch.affine` puts in what
the running statistics say they are on average, by the law of total variance over the group's channels::

    mu_g = mean_c mu_c        sigma_g^2 = mean_c var_c + var_c(mu_c)

A fresh norm (mean 0, variance 1) thus starts from its own gamma and beta.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ilmconvert.nn.functional import Standardization
from ilmconvert.norms.registry import NormHandler, has_act, register
from ilmconvert.norms.spec import NormSpec

_SPATIAL = {"BatchNorm2d": 2, "BatchNormAct2d": 2, "FrozenBatchNorm2d": 2, "FrozenBatchNormAct2d": 2, "BatchNorm3d": 3}


def _spatial(module: nn.Module) -> int | None:
    names = [c.__name__ for c in type(module).__mro__]
    return next((n for name in names for known, n in _SPATIAL.items() if name.endswith(known)), None)


@register(
    "torch.nn.modules.batchnorm.BatchNorm1d",
    "torch.nn.modules.batchnorm.BatchNorm2d",
    "torch.nn.modules.batchnorm.BatchNorm3d",
    "torch.nn.modules.batchnorm.SyncBatchNorm",
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
        )

    def affine(self, module: nn.Module, num_groups: int) -> tuple[Tensor | None, Tensor | None]:
        """Scale and shift that are right on average over the data the running statistics come from."""
        mean, var = getattr(module, "running_mean", None), getattr(module, "running_var", None)
        gamma, beta = getattr(module, "weight", None), getattr(module, "bias", None)
        if mean is None or var is None:
            return gamma, beta
        mean, var = mean.detach().double(), var.detach().double()
        eps = self.eps_of(module)
        a = (1.0 if gamma is None else gamma.detach().double()) * torch.rsqrt(var + eps)
        within, centers = var.view(num_groups, -1), mean.view(num_groups, -1)
        sigma = (within.mean(1) + centers.var(1, correction=0) + eps).sqrt()
        size = len(mean) // num_groups
        scale = a * sigma.repeat_interleave(size)
        shift = a * (centers.mean(1).repeat_interleave(size) - mean) + (0.0 if beta is None else beta.detach().double())
        return scale, shift
