"""Normalizing layers without an ILM equivalent, each with the reason that the report gives."""

from __future__ import annotations

from ilmconvert.norms.registry import refuse

_EVO = tuple(f"timm.layers.evo_norm.EvoNorm2d{k}" for k in ("B0", "B1", "B2", "S0", "S0a", "S1", "S1a", "S2", "S2a"))

refuse(
    _EVO,
    "fused-nonlinearity",
    "EvoNorm fuses normalization and activation into one formula; there is no standardized input to rescale",
)
refuse(
    (
        "timm.layers.filter_response_norm.FilterResponseNormTlu2d",
        "timm.layers.filter_response_norm.FilterResponseNormAct2d",
    ),
    "fused-nonlinearity",
    "Filter Response Norm pairs an uncentered norm with a thresholded activation of its own; it needs no batch already",
)
refuse(
    ("timm.layers.grn.GlobalResponseNorm", "transformers.models.convnextv2.modeling_convnextv2.ConvNextV2GRN"),
    "not-a-standardization",
    "Global Response Norm contrasts channels with one another; it does not standardize",
)
refuse(
    ("timm.models.mlp_mixer.Affine",),
    "not-a-standardization",
    "Affine only scales and shifts; it does not standardize",
)
refuse(
    ("timm.layers.split_batchnorm.SplitBatchNorm2d",),
    "split-statistics",
    "Split BatchNorm keeps several sets of batch statistics; convert it to BatchNorm before converting the model",
)
refuse(
    ("timm.layers.inplace_abn.InplaceAbn",),
    "external-kernel",
    "Inplace ABN runs a kernel of its own that overwrites its input; build the model with another norm layer",
)
refuse(
    ("torch.nn.modules.normalization.LocalResponseNorm", "torch.nn.modules.normalization.CrossMapLRN2d"),
    "not-a-standardization",
    "Local Response Norm divides by the neighbouring channels' energy; it does not standardize",
)
