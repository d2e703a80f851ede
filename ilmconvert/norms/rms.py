"""Root Mean Square norm (Zhang and Sennrich, 2019) and timm's SimpleNorm: no mean is subtracted.

SimpleNorm divides by the unbiased standard deviation, not by the root mean square. The 2d forms take ``(N, C, H, W)``
and normalize each position over its channels.
"""

from __future__ import annotations

from typing import Literal

from torch import nn

from ilmconvert.nn.functional import Layout, Standardization
from ilmconvert.norms.registry import NormHandler, has_act, register, returns_input_dtype
from ilmconvert.norms.spec import NormSpec

_TIMM, _FUSED = "timm.layers.norm", "timm.layers.norm_act"


@register(
    "torch.nn.modules.normalization.RMSNorm",
    f"{_TIMM}.RmsNorm",
    f"{_TIMM}.RmsNormFp32",
    f"{_FUSED}.RmsNormAct",
    f"{_FUSED}.RmsNormActFp32",
)
class Rms(NormHandler):
    """``nn.RMSNorm`` and timm's, over trailing dimensions."""

    family = "rms"
    layout: Layout = "token"
    scale_by: Literal["var", "rms"] = "rms"
    output: Literal["native", "promoted"] = "native"

    def describe(self, module: nn.Module) -> NormSpec:
        """Read the module's own normalized_shape and eps."""
        how = Standardization(
            layout=self.layout,
            center=False,
            scale_by=self.scale_by,
            unbiased=self.scale_by == "var",
            eps=module.eps,  # type: ignore[arg-type]
            output="input" if returns_input_dtype(module) else self.output,
        )
        shape = tuple(int(length) for length in module.normalized_shape)  # type: ignore[union-attr]
        return NormSpec(shape, 1, how, weight=module.weight is not None, bias=False, has_act=has_act(module))


@register(
    f"{_TIMM}.RmsNorm2d",
    f"{_TIMM}.RmsNorm2dFp32",
    f"{_FUSED}.RmsNormAct2d",
    f"{_FUSED}.RmsNormAct2dFp32",
)
class Rms2d(Rms):
    """timm's RMS norm over the channels of each position, written out as tensor arithmetic."""

    layout: Layout = "position"
    output: Literal["native", "promoted"] = "promoted"


@register(f"{_TIMM}.SimpleNorm", f"{_TIMM}.SimpleNormFp32")
class Simple(Rms):
    """timm's SimpleNorm over trailing dimensions."""

    scale_by: Literal["var", "rms"] = "var"
    output: Literal["native", "promoted"] = "promoted"


@register(f"{_TIMM}.SimpleNorm2d", f"{_TIMM}.SimpleNorm2dFp32")
class Simple2d(Simple):
    """timm's SimpleNorm over the channels of each position."""

    layout: Layout = "position"
