"""Layer Norm: a token's channels, or several trailing dimensions (Ba, Kiros and Hinton, 2016).

The 2d forms take ``(N, C, H, W)`` and normalize each position over its channels.
"""

from __future__ import annotations

from torch import nn

from ilmconvert.nn.functional import Layout, Standardization
from ilmconvert.norms.registry import NormHandler, has_act, register, returns_input_dtype
from ilmconvert.norms.spec import NormSpec

_TIMM, _FUSED, _META = "timm.layers.norm", "timm.layers.norm_act", "timm.models.metaformer"


@register(
    "torch.nn.modules.normalization.LayerNorm",
    f"{_TIMM}.LayerNorm",
    f"{_TIMM}.LayerNormFp32",
    f"{_META}.LayerNormNoBias",
    f"{_FUSED}.LayerNormAct",
    f"{_FUSED}.LayerNormActFp32",
)
class Layer(NormHandler):
    """``nn.LayerNorm`` over the last or several trailing dimensions."""

    family = "layer"
    layout: Layout = "token"

    def describe(self, module: nn.Module) -> NormSpec:
        """Read the module's own normalized_shape and eps."""
        return self.over(module, self.layout)

    def over(self, module: nn.Module, layout: Layout) -> NormSpec:
        """The module's function in a layout."""
        how = Standardization(
            layout=layout,
            eps=module.eps,  # type: ignore[arg-type]
            output="input" if returns_input_dtype(module) else "native",
        )
        return NormSpec(
            shape=tuple(int(length) for length in module.normalized_shape),  # type: ignore[union-attr]
            num_groups=1,
            standardization=how,
            weight=module.weight is not None,
            bias=module.bias is not None,
            has_act=has_act(module),
        )


@register(
    f"{_TIMM}.LayerNorm2d",
    f"{_TIMM}.LayerNorm2dFp32",
    f"{_TIMM}.LayerNormExp2d",
    f"{_META}.LayerNorm2dNoBias",
    "torchvision.models.convnext.LayerNorm2d",
    "segmentation_models_pytorch.decoders.upernet.decoder.LayerNorm2d",
    f"{_FUSED}.LayerNormAct2d",
    f"{_FUSED}.LayerNormAct2dFp32",
)
class Layer2d(Layer):
    """Layer Norm over the channels of each position of ``(N, C, *)``."""

    layout: Layout = "position"
