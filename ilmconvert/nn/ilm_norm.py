"""ILM-Norm as a layer: stage 1 of any instance-level norm, rescaled by a predictor (Jia, Chen, Chen, CVPR 2019)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ilmconvert.nn.functional import (
    Config,
    Parameters,
    Standardization,
    autocast_enabled,
    check_shape,
    plain_ilm_norm,
    standardize,
)
from ilmconvert.nn.fused import fused_ilm_norm
from ilmconvert.nn.grouping import bottleneck, key_groups, nearest_groups
from ilmconvert.nn.predictor import MetaPredictor
from ilmconvert.nn.silent import is_silent

__all__ = ["ILMNorm", "ILMNormAct", "Mode"]

Mode = Literal["preserve", "paper"]
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked", "track_running_stats", "momentum")


class ILMNorm(nn.Module):
    """Instance-Level Meta Normalization.

    Stage 1 standardizes each group of an instance as Group, Layer, Instance or RMS norm does; stage 2 rescales by
    ``weight`` and ``bias`` plus what a tiny auto-encoder predicts from the means and variances of the instance's key
    groups. See :mod:`ilmconvert.nn.functional` for the algebra.

    In mode ``preserve`` the decoders start at zero: the layer *is* the base norm with ``weight`` and ``bias``, to
    rounding, and both decoders receive gradient. In terms of the paper, ``B_omega = weight - scale_gain / 2``. In mode
    ``paper`` the layer starts and computes as the authors' release: both variances unbiased, default ``nn.Linear``
    initialisation, ``B_omega = 1`` (``weight = 1.5``).

    Args:
        num_channels: ``C``, or the ``normalized_shape`` of a Layer or RMS norm; of several trailing dimensions the
            first one is the channel dimension that is cut into key groups.
        num_groups: ``G``: 1 is Layer Norm, ``C`` is Instance Norm. None takes the divisor of ``C`` nearest to 32, or 1
            for the layouts ``position`` and ``token``.
        standardization: stage 1 (layout, centering, eps, ...).
        num_key_groups: ``K``. None cuts 16 channels each, or the nearest divisor.
        hidden_features: ``e``, the embedding's width. None follows the authors' rule with reduction 16.
        mode: ``"preserve"`` or ``"paper"``.
        weight, bias: whether there is a learned scale and shift per element (the paper's B terms).
        gains: learn a factor per element on each prediction (an extension of the paper; 1 is the paper).
        standardized_keys, num_blocks: extensions of the predictor, see :mod:`ilmconvert.nn.predictor`.
        device, dtype: of the parameters.

    Shape:
        - layout ``sample`` and ``position``: ``(N, C, *)``, any number of spatial dimensions, also none.
        - layout ``token``: ``(*, *normalized_shape)``.
        - output: as the input, in the memory format that the base norm returns. Statistics are computed in float32 at
          least.

    Raises:
        ValueError: group counts that do not divide the channels, an unknown mode, or (in ``forward``) an input with
            other channels.

    Example:
        >>> import torch
        >>> from ilmconvert.nn import ILMNorm
        >>> layer, base = ILMNorm(64, num_groups=8), torch.nn.GroupNorm(8, 64)
        >>> x = torch.randn(2, 64, 7, 7)
        >>> torch.allclose(layer(x), base(x), atol=1e-5)
        True
        >>> layer
        ILMNorm(64, num_groups=8, num_key_groups=4, hidden_features=2, eps=1e-05)
    """

    def __init__(
        self,
        num_channels: int | Sequence[int],
        num_groups: int | None = None,
        *,
        standardization: Standardization | None = None,
        num_key_groups: int | None = None,
        hidden_features: int | None = None,
        mode: Mode = "preserve",
        weight: bool = True,
        bias: bool = True,
        gains: bool = False,
        standardized_keys: bool = False,
        num_blocks: int = 1,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if mode not in get_args(Mode):
            raise ValueError(f"ILMNorm expected mode 'preserve' or 'paper', got {mode!r}")
        self.mode = mode
        self.normalized_shape = (num_channels,) if isinstance(num_channels, int) else tuple(num_channels)
        how = Standardization(unbiased=mode == "paper") if standardization is None else standardization
        self.standardization = how
        if num_groups is None:
            num_groups = nearest_groups(self.num_channels, 32) if how.layout == "sample" else 1
        if num_key_groups is None:
            num_key_groups = key_groups(self.num_channels)
        self.num_groups = self._divisor("num_groups", num_groups)
        self.num_key_groups = self._divisor("num_key_groups", num_key_groups)
        grouped = 1 < self.num_groups < self.num_channels
        default_hidden = bottleneck(self.num_key_groups, mode=mode, grouped=grouped)
        self.hidden_features = default_hidden if hidden_features is None else hidden_features
        if self.hidden_features < 1:
            raise ValueError(f"ILMNorm expected hidden_features of at least 1, got {hidden_features}")

        shape = self.normalized_shape
        self.weight = _parameter(shape, weight, device, dtype)
        self.bias = _parameter(shape, bias, device, dtype)
        self.predictor = MetaPredictor(
            self.num_key_groups,
            self.hidden_features,
            num_blocks=num_blocks,
            standardized_keys=standardized_keys,
            device=device,
            dtype=dtype,
        )
        self.scale_gain = _parameter(shape, gains, device, dtype)
        self.shift_gain = _parameter(shape, gains, device, dtype)
        self.reset_parameters()

    def _divisor(self, name: str, value: int) -> int:
        if value < 1 or self.num_channels % value:
            near = nearest_groups(self.num_channels, max(value, 1))
            raise ValueError(
                f"ILMNorm expected {name} to divide its {self.num_channels} channels, got {value}; the nearest that "
                f"does is {near}"
            )
        return value

    def __getattr__(self, name: str) -> Any:
        """Tell code that folds a Batch Norm into a convolution why it cannot (``fuse``, ``reparameterize``)."""
        if name in _STATISTICS:
            raise AttributeError(
                f"{type(self).__name__} has no {name!r}: it takes its statistics from each instance, so it cannot be "
                "folded into a convolution; revert the conversion (Conversion.revert) before fusing the model"
            )
        return nn.Module.__getattr__(self, name)

    @property
    def num_channels(self) -> int:
        """``C``, the length of the channel dimension."""
        return self.normalized_shape[0]

    @property
    def num_features(self) -> int:
        """``C``, by the name that Batch and Instance Norm have for it."""
        return self.num_channels

    @property
    def affine(self) -> bool:
        """Whether there is a scale; Layer and RMS Norm call it ``elementwise_affine``, the others so."""
        return self.weight is not None

    elementwise_affine = affine

    @property
    def eps(self) -> float | None:
        """Added to the variance (see :class:`Standardization`)."""
        return self.standardization.eps

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start afresh, as the mode says."""
        for parameter, value in (
            (self.weight, 1.5 if self.mode == "paper" else 1.0),
            (self.bias, 0.0),
            (self.scale_gain, 1.0),
            (self.shift_gain, 1.0),
        ):
            if parameter is not None:
                nn.init.constant_(parameter, value)
        if self.mode == "preserve":
            self.predictor.silence()
        else:
            self.predictor.reset_parameters()

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  (torch's norms call it so, and may be called by keyword)
        """Normalize ``input``."""
        predictor = self.predictor
        return ilm_norm(
            input,
            Parameters(
                self.weight,
                self.bias,
                *predictor.weights(),
                self.scale_gain,
                self.shift_gain,
                predictor.key_center,
                predictor.key_scale,
            ),
            Config(self.normalized_shape, self.num_groups, self.num_key_groups, self.standardization),
        )

    def __repr__(self) -> str:
        """One line, as torch's own norms print; the predictor's sizes are in it."""
        return f"{type(self).__name__}({self.extra_repr()})"

    def extra_repr(self) -> str:
        """The arguments that tell two layers apart."""
        how, default = self.standardization, Standardization(unbiased=self.mode == "paper")
        parts = [
            f"{self.num_channels if len(self.normalized_shape) == 1 else self.normalized_shape}",
            *(f"{name}={getattr(self, name)}" for name in ("num_groups", "num_key_groups", "hidden_features", "eps")),
            *(
                f"{name}={getattr(how, name)}"
                for name in ("layout", "center", "scale_by", "unbiased")
                if getattr(how, name) != getattr(default, name)
            ),
            *(f"{name}=False" for name in ("weight", "bias") if getattr(self, name) is None),
        ]
        parts += ["gains=True"] if self.scale_gain is not None else []
        parts += ["standardized_keys=True"] if self.predictor.key_center is not None else []
        parts += [f"num_blocks={self.predictor.num_blocks}"] if self.predictor.num_blocks > 1 else []
        return ", ".join(parts + (["mode=paper"] if self.mode == "paper" else []))


class ILMNormAct(ILMNorm):
    """ILM-Norm followed by dropout and an activation, as timm's fused norm+act layers are.

    ``drop`` and ``act`` are the original layer's own modules, under the names they have in timm. Conversion sets them;
    a layer that is made by hand has none until they are assigned. Arguments and shapes are those of :class:`ILMNorm`.

    Example:
        >>> layer = ILMNormAct(16, num_groups=4)
        >>> layer.drop, layer.act = nn.Identity(), nn.ReLU()
        >>> y = layer(torch.randn(2, 16, 5, 5))
        >>> tuple(y.shape), bool((y >= 0).all())
        ((2, 16, 5, 5), True)
    """

    drop: nn.Module
    act: nn.Module

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """Normalize ``input``, then drop, then activate."""
        return self.act(self.drop(super().forward(input)))  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        """As :class:`ILMNorm`, with what follows the norm."""
        parts = [super().extra_repr(), f"act={self.act}"]
        return ", ".join(parts if isinstance(self.drop, nn.Identity) else [*parts, f"drop={self.drop}"])


def _parameter(
    shape: tuple[int, ...], present: bool, device: torch.device | None, dtype: torch.dtype | None
) -> nn.Parameter | None:
    return nn.Parameter(torch.empty(shape, device=device, dtype=dtype)) if present else None


def ilm_norm(x: Tensor, parameters: Parameters, config: Config) -> Tensor:
    """ILM-Norm as a function: computed in float32 at least, returned in the dtype the base norm returns.

    Args:
        x: the input, see :mod:`ilmconvert.nn.functional` for the layouts.
        parameters: the layer's tensors.
        config: the layer's constants.

    Raises:
        ValueError: an input with other channels, or of integers.
    """
    how = config.how
    if x.ndim == how.unbatched_ndim:
        return ilm_norm(x.unsqueeze(0), parameters, config).squeeze(0)
    check_shape(x, how.layout, config.shape)
    autocast = autocast_enabled(x)
    dtype = how.output_dtype(x, parameters.weight) if autocast or how.output == "promoted" else x.dtype
    if x.numel() == 0:  # no instance, no statistics; but the parameters get gradients of zeros
        return (x + sum(p.sum() for p in parameters if p is not None)).to(dtype)
    if x.dtype not in (torch.float32, torch.float64):
        x = x.to(torch.float32)
    parameters = parameters.to(x.dtype)
    if autocast:
        with torch.autocast(x.device.type, enabled=False):
            y = _computed(x, parameters, config)
    else:
        y = _computed(x, parameters, config)
    return y if y.dtype is dtype else y.to(dtype)


def _computed(x: Tensor, parameters: Parameters, config: Config) -> Tensor:
    if is_silent(x, parameters):
        return standardize(x, config.shape, config.num_groups, config.how, parameters.weight, parameters.bias)
    y = fused_ilm_norm(x, parameters, config)
    return plain_ilm_norm(x, parameters, config) if y is None else y


torch.fx.wrap("ilm_norm")  # a plain symbolic_trace records one call instead of tracing through it
