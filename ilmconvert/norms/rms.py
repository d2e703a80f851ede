"""Root Mean Square norm (Zhang and Sennrich, 2019) and timm's SimpleNorm: no mean is subtracted.

SimpleNorm divides by the unbiased standard deviation, not by the root mean square.
"""

from __future__ import annotations

from typing import Literal

from torch import nn

from ilmconvert.nn.functional import Layout, Standardization
from ilmconvert.norms.registry import NormHandler, register
from ilmconvert.norms.spec import NormSpec

_TIMM, _FUSED = "timm.layers.norm", "timm.layers.norm_act"


@register("torch.nn.modules.normalization.RMSNorm", f"{_TIMM}.RmsNorm", f"{_TIMM}.RmsNormFp32")
class Rms(NormHandler):
    """``nn.RMSNorm`` and timm's, over trailing dimensions."""

    family = "rms"
    layout: Layout = "token"
    scale_by: Literal["var", "rms"] = "rms"
    promotes = False

    def describe(self, module: nn.Module) -> NormSpec:
        """Read the module's own normalized_shape and eps."""
        how = Standardization(
            layout=self.layout,
            center=False,
            scale_by=self.scale_by,
            unbiased=self.scale_by == "var",
            eps=module.eps,  # type: ignore[arg-type]
            promotes=self.promotes,
        )
        shape = tuple(module.normalized_shape)  # type: ignore[arg-type]
        return NormSpec(shape, 1, how, weight=module.weight is not None, bias=False)


@register(f"{_FUSED}.RmsNormAct", f"{_FUSED}.RmsNormActFp32")
class RmsAct(Rms):
    """timm's RMS norm with dropout and activation."""

    def describe(self, module: nn.Module) -> NormSpec:
        """As :class:`Rms`, with the activation."""
        return super().describe(module).with_act()


@register(f"{_TIMM}.RmsNorm2d")
class Rms2d(Rms):
    """RMS norm over the channels of each position of ``(N, C, H, W)``."""

    layout: Layout = "position"
    promotes = True


@register(f"{_TIMM}.RmsNorm2dFp32")
class Rms2dFp32(Rms2d):
    """As :class:`Rms2d`, returning the input's dtype."""

    promotes = False


@register(f"{_FUSED}.RmsNormAct2d")
class RmsAct2d(RmsAct):
    """timm's 2d RMS norm with dropout and activation."""

    layout: Layout = "position"
    promotes = True


@register(f"{_FUSED}.RmsNormAct2dFp32")
class RmsAct2dFp32(RmsAct2d):
    """As :class:`RmsAct2d`, returning the input's dtype."""

    promotes = False


@register(f"{_TIMM}.SimpleNorm")
class Simple(Rms):
    """timm's SimpleNorm over trailing dimensions."""

    scale_by: Literal["var", "rms"] = "var"
    promotes = True


@register(f"{_TIMM}.SimpleNormFp32")
class SimpleFp32(Simple):
    """As :class:`Simple`, returning the input's dtype."""

    promotes = False


@register(f"{_TIMM}.SimpleNorm2d")
class Simple2d(Simple):
    """timm's SimpleNorm over the channels of each position of ``(N, C, H, W)``."""

    layout: Layout = "position"


@register(f"{_TIMM}.SimpleNorm2dFp32")
class Simple2dFp32(Simple2d):
    """As :class:`Simple2d`, returning the input's dtype."""

    promotes = False
