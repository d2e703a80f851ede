"""Group Norm: each group of channels over all positions of a sample (Wu and He, 2018)."""

from __future__ import annotations

from torch import nn

from ilmconvert.nn.functional import Standardization
from ilmconvert.norms.registry import NormHandler, has_act, register
from ilmconvert.norms.spec import NormSpec

_TIMM, _FUSED = "timm.layers.norm", "timm.layers.norm_act"


@register(
    "torch.nn.modules.normalization.GroupNorm",
    f"{_TIMM}.GroupNorm",
    f"{_TIMM}.GroupNorm1",
    "timm.models.metaformer.GroupNorm1NoBias",
    f"{_FUSED}.GroupNormAct",
    f"{_FUSED}.GroupNorm1Act",
)
class Group(NormHandler):
    """``nn.GroupNorm``, its one-group and bias-free forms, and timm's with dropout and activation."""

    family = "group"

    def describe(self, module: nn.Module) -> NormSpec:
        """Read the module's own groups and eps."""
        return NormSpec(
            shape=(int(module.num_channels),),  # type: ignore[arg-type]
            num_groups=int(module.num_groups),  # type: ignore[arg-type]
            standardization=Standardization(eps=module.eps),  # type: ignore[arg-type]
            weight=module.weight is not None,
            bias=module.bias is not None,
            has_act=has_act(module),
        )
