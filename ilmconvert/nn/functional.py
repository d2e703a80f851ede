"""ILM-Norm's arithmetic on one canonical view of any input.

Every supported norm sees its input as ``(A, C, S)``: ``C`` channels, ``S`` values per channel, ``A`` outer positions.

========  =====================  ======================  ===============================================
layout    input                  canonical view          one instance (what is standardized together)
========  =====================  ======================  ===============================================
sample    ``(N, C, *)``          ``(N, C, prod(*))``     a sample: a group's channels at every position
position  ``(N, C, *)``          ``(N, C, prod(*))``     one position of a sample: its ``C`` values
token     ``(*, C, *inner)``     ``(prod(*), C, inner)`` one leading index: all trailing dimensions
========  =====================  ======================  ===============================================

With ``G`` norm groups and ``K`` key groups, both cut along ``C`` over the same support::

    x^ = (x - mean_G) / sqrt(var_G + eps)                         stage 1
    scale = weight + scale_gain * (D_scale(var_K) - 1/2)          stage 2
    shift = bias   + shift_gain * D_shift(mean_K)
    y = scale * x^ + shift

With *standardized keys* (an extension of the paper) the predictor is shown ``sqrt(var_K + eps)`` in place of the
variance, and both features less a fixed center over a fixed scale.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "Config",
    "Layout",
    "Parameters",
    "Standardization",
    "autocast_enabled",
    "canonical",
    "check_shape",
    "decode",
    "group_moments",
    "halved",
    "joined_decoders",
    "key_features",
    "plain_ilm_norm",
    "predict",
    "standardize",
]

Layout = Literal["sample", "position", "token"]
_LAYOUTS = get_args(Layout)


def autocast_enabled(x: Tensor) -> bool:
    """Whether autocast is on for the tensor's device; devices that know no autocast (meta) never have it on."""
    if not torch._C._is_any_autocast_enabled():
        return False
    return torch.amp.is_autocast_available(x.device.type) and torch.is_autocast_enabled(x.device.type)


@dataclass(frozen=True)
class Standardization:
    """Stage 1 as plain data: which values are standardized together, and how.

    Attributes:
        layout: where the channels are and what one instance is, see the module docstring.
        center: subtract the mean (Root Mean Square norms do not).
        scale_by: divide by the standard deviation (``"var"``) or by the root mean square (``"rms"``).
        unbiased: the variance divides by n - 1 (mode ``paper``, timm's SimpleNorm).
        eps: added to the variance; None means the input dtype's machine epsilon, as in ``torch.nn.RMSNorm``.
        unbatched_ndim: inputs of this rank lack the batch dimension (``torch.nn.InstanceNorm*`` take those).
        output: the dtype returned. ``input``: the input's. ``native``: the same, but under autocast what torch's own
            kernel for the layout returns. ``promoted``: the common dtype of input and weight, as norms return that
            are written out as tensor arithmetic.

    Raises:
        ValueError: an unknown layout or divisor, or a root mean square of what is centered.

    Example:
        >>> from ilmconvert.nn import ILMNorm
        >>> rms = Standardization(layout="token", center=False, scale_by="rms", eps=1e-6)
        >>> layer, base = ILMNorm(32, standardization=rms, bias=False), torch.nn.RMSNorm(32, eps=1e-6)
        >>> x = torch.randn(4, 7, 32)
        >>> torch.allclose(layer(x), base(x), atol=1e-5)
        True
    """

    layout: Layout = "sample"
    center: bool = True
    scale_by: Literal["var", "rms"] = "var"
    unbiased: bool = False
    eps: float | None = 1e-5
    unbatched_ndim: int | None = None
    output: Literal["native", "input", "promoted"] = "native"

    def __post_init__(self) -> None:
        if self.layout not in _LAYOUTS or self.scale_by not in ("var", "rms"):
            raise ValueError(
                f"Standardization expected layout among {_LAYOUTS} and scale_by 'var' or 'rms', got {self.layout!r} "
                f"and {self.scale_by!r}"
            )
        if self.center and self.scale_by == "rms":
            raise ValueError("Standardization expected center=False with scale_by='rms', got center=True")
        if self.eps is not None:
            object.__setattr__(self, "eps", float(self.eps))

    @property
    def has_kernel(self) -> bool:
        """Whether torch's Group or Layer Norm computes it."""
        return self.center and self.scale_by == "var" and not self.unbiased

    @property
    def reduced(self) -> tuple[int, ...]:
        """The dimensions of ``(A, groups, C / groups, S)`` that one group's statistics run over."""
        return (2,) if self.layout == "position" else (2, 3)

    def output_dtype(self, x: Tensor, weight: Tensor | None) -> torch.dtype:
        """The dtype the plain norm would return for ``x`` here, autocast included."""
        if self.output == "promoted":
            return x.dtype if weight is None else torch.promote_types(x.dtype, weight.dtype)
        if self.output == "input" or not autocast_enabled(x):
            return x.dtype
        probe = x.new_empty(1, 1, 2)  # torch alone knows what autocast does to each kernel on each device
        if self.scale_by == "rms":
            return F.rms_norm(probe, (2,)).dtype
        return (F.group_norm(probe, 1) if self.layout == "sample" else F.layer_norm(probe, (2,))).dtype


def _channel_dim(ndim: int, layout: Layout, shape: tuple[int, ...]) -> int:
    return ndim - len(shape) if layout == "token" else 1


def check_shape(x: Tensor, layout: Layout, shape: tuple[int, ...]) -> None:
    """Raise unless ``x`` has the channels that the layer was made for, of floating-point values.

    Raises:
        ValueError: it does not.
    """
    if x.is_nested:
        raise ValueError("ILMNorm expected a dense tensor, got a nested one: call it on its values(), or pad it")
    if not x.is_floating_point():
        raise ValueError(f"ILMNorm expected a floating-point input, got {x.dtype}")
    at = _channel_dim(x.ndim, layout, shape)
    if x.ndim <= at or at < 0 or tuple(x.shape[at : at + len(shape)]) != shape:
        where = "in its last dimensions" if layout == "token" else "in dimension 1"
        raise ValueError(f"ILMNorm expected an input with {shape} {where} (layout {layout!r}), got {tuple(x.shape)}")


def canonical(x: Tensor, layout: Layout, shape: tuple[int, ...]) -> Tensor:
    """View ``x`` as ``(A, C, S)``; no copy for contiguous and channels_last inputs."""
    at = _channel_dim(x.ndim, layout, shape)
    outer, inner = math.prod(list(x.shape[:at])), math.prod(list(x.shape[at + 1 :]))
    return x.reshape(outer, shape[0], inner)


def _grouped(x: Tensor, groups: int) -> Tensor:
    """``(A, C, S)`` as ``(A, groups, C / groups, S)``."""
    return x.reshape(x.shape[0], groups, x.shape[1] // groups, x.shape[2])


def group_moments(x: Tensor, groups: int, how: Standardization) -> tuple[Tensor, Tensor]:
    """Mean and variance of each group of the canonical ``(A, C, S)``: two tensors ``(A, groups, 1, 1 or S)``.

    A group of a single value has variance 0 whatever ``how.unbiased`` says: never NaN.
    """
    grouped = _grouped(x, groups)
    count = math.prod([grouped.shape[d] for d in how.reduced])
    var, mean = torch.var_mean(grouped, how.reduced, correction=int(how.unbiased and count > 1), keepdim=True)
    return mean, var


def standardize(
    x: Tensor,
    shape: tuple[int, ...],
    groups: int,
    how: Standardization,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Stage 1 of ``x`` in its own layout and memory format; with ``weight`` and ``bias``, the base norm.

    Where torch has a kernel for it, that kernel is used, so that a converted norm rounds as the original does.
    """
    eps = torch.finfo(x.dtype).eps if how.eps is None else how.eps
    if how.has_kernel:
        if how.layout == "sample":
            return torch.group_norm(x, groups, weight, bias, eps)
        if how.layout == "token":
            return F.layer_norm(x, shape, weight, bias, eps)
        last = x.ndim - 1  # torch's older ONNX exporter takes no negative one
        return F.layer_norm(x.movedim(1, last), shape, weight, bias, eps).movedim(last, 1)
    flat = canonical(x, how.layout, shape)
    grouped = _grouped(flat, groups)
    if how.scale_by == "rms":
        mean, power = None, grouped.square().mean(how.reduced, keepdim=True)
    else:
        mean, power = group_moments(flat, groups, how)
    if how.center and mean is not None:
        grouped = grouped - mean
    y = (grouped * torch.rsqrt(power + eps)).reshape(flat.shape)
    y = y if weight is None else y * weight.reshape(1, shape[0], -1)
    y = y if bias is None else y + bias.reshape(1, shape[0], -1)
    return y.reshape(x.shape)


def key_features(spread: Tensor, mean: Tensor, center: Tensor | None, scale: Tensor | None) -> Tensor:
    """What the predictor is shown of the key groups' moments, for the scale and for the shift: ``(2, M, K)``.

    Args:
        spread, mean: ``(M, K)``, of ``M`` instances; the spread is ``sqrt(var + eps)`` with standardized keys, else the
            variance.
        center, scale: ``(2, K)`` of deviation and mean, with standardized keys.
    """
    features = torch.stack((spread, mean))
    if center is None or scale is None:
        return features
    return (features - center.unsqueeze(1)) / scale.unsqueeze(1)


def joined_decoders(scale_decoder: Tensor, shift_decoder: Tensor) -> Tensor:
    """Both decoders as :func:`decode` takes them, ``(2, e / B, K)``: ``2 sigmoid(z) - 1 = tanh(z / 2)``.

    They lie so that the backward pass multiplies by them as they are, which takes half as long for a narrow embedding.
    """
    return torch.stack((halved(scale_decoder).T, shift_decoder.T))


def halved(x: Tensor) -> Tensor:
    """``x / 2``, exactly; a factor that is a Python number would cost a tensor and a conversion more."""
    return torch.sub(x, x, alpha=0.5)


def decode(
    features: Tensor, encoder: Tensor, decoders: Tensor, tanh: Callable[[Tensor], Tensor] = torch.tanh
) -> tuple[Tensor, Tensor]:
    """Both branches of the auto-encoder.

    Args:
        features: ``(2, M, K)``, of ``M`` instances.
        encoder: ``(e, K / B)``; with ``B`` blocks, each serves its own part of the key groups and of the embedding, as
            the groups of a convolution do.
        decoders: see :func:`joined_decoders`.
        tanh: the activation, for a path that has a faster one.

    Returns:
        The embeddings ``(2, e, M)``, which for many instances makes far faster matrix products than their transpose,
        and ``2 D_scale - 1`` and ``D_shift``: ``(2, M, K)``.
    """
    blocks = features.shape[2] // encoder.shape[1]
    if blocks == 1:
        hidden = torch.relu(torch.bmm(encoder.expand(2, -1, -1), features.transpose(-1, -2)))
        return hidden, tanh(torch.bmm(hidden.transpose(-1, -2), decoders))
    cut = encoder.unflatten(0, (blocks, -1))
    hidden = torch.relu(torch.einsum("nmbi,boi->nbom", features.unflatten(2, (blocks, -1)), cut))
    z = torch.einsum("nbim,nibo->nmbo", hidden, decoders.unflatten(2, (blocks, -1)))
    return hidden.flatten(1, 2), tanh(z.flatten(2).contiguous())


def predict(features: Tensor, meta: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """``D_scale - 1/2`` and ``D_shift``, two ``(M, K)``; ``meta`` is encoder, scale decoder and shift decoder."""
    encoder, *decoders = meta
    decoded = decode(features, encoder, joined_decoders(*decoders))[1]
    return decoded[0] * 0.5, decoded[1]


class Parameters(NamedTuple):
    """The tensors of one layer; None where it has none.

    Attributes:
        weight, bias: per element, or None for a constant 1 and 0.
        encoder, scale_decoder, shift_decoder: the predictor, ``(e, K / B)`` and twice ``(K, e / B)``.
        scale_gain, shift_gain: factors per element on the predictions, or None for 1.
        key_center, key_scale: ``(2, K)`` with standardized keys, see :func:`key_features`.
    """

    weight: Tensor | None
    bias: Tensor | None
    encoder: Tensor
    scale_decoder: Tensor
    shift_decoder: Tensor
    scale_gain: Tensor | None = None
    shift_gain: Tensor | None = None
    key_center: Tensor | None = None
    key_scale: Tensor | None = None

    def to(self, dtype: torch.dtype) -> Parameters:
        """The same tensors in ``dtype``."""
        if all(p is None or p.dtype is dtype for p in self):
            return self
        return Parameters(*(None if p is None else p.to(dtype) for p in self))  # type: ignore[arg-type]


class Config(NamedTuple):
    """What does not change from tensor to tensor.

    Attributes:
        shape: the channels, or the whole ``normalized_shape``.
        num_groups: ``G`` of stage 1.
        num_key_groups: ``K``.
        how: stage 1.
    """

    shape: tuple[int, ...]
    num_groups: int
    num_key_groups: int
    how: Standardization


def _rescaling(x: Tensor, parameters: Parameters, config: Config) -> tuple[Tensor, Tensor]:
    """Scale and shift of stage 2 for the canonical ``x``: ``(A, C, 1 or S)`` each."""
    channels, keys = x.shape[1], config.num_key_groups

    def per_element(parameter: Tensor) -> Tensor:
        return parameter.reshape(1, channels, -1)

    def per_channel(prediction: Tensor, gain: Tensor | None) -> Tensor:
        channelwise = prediction.reshape(mean.shape).repeat_interleave(channels // keys, dim=2).transpose(-1, -2)
        return channelwise if gain is None else channelwise * per_element(gain)

    mean, var = (feature.squeeze(2).transpose(-1, -2) for feature in group_moments(x, keys, config.how))
    eps = torch.finfo(x.dtype).eps if config.how.eps is None else config.how.eps
    rows = (mean.shape[0] * mean.shape[1], keys)
    spread = var if parameters.key_center is None else (var + eps).sqrt()
    features = key_features(spread.reshape(rows), mean.reshape(rows), parameters.key_center, parameters.key_scale)
    meta = parameters.encoder, parameters.scale_decoder, parameters.shift_decoder
    d_scale, d_shift = predict(features, meta)
    scale = per_channel(d_scale, parameters.scale_gain)
    shift = per_channel(d_shift, parameters.shift_gain)
    scale = scale + (1.0 if parameters.weight is None else per_element(parameters.weight))
    return scale, shift if parameters.bias is None else shift + per_element(parameters.bias)


def plain_ilm_norm(x: Tensor, parameters: Parameters, config: Config) -> Tensor:
    """ILM-Norm of ``x`` in its own layout, as the module docstring writes it; any layout, any transform of torch.

    Args:
        x: in the dtype of the parameters.
        parameters: the layer's tensors.
        config: the layer's constants.
    """
    shape, groups, _, how = config
    scale, shift = _rescaling(canonical(x, how.layout, shape), parameters, config)
    standardized = canonical(standardize(x, shape, groups, how), how.layout, shape)
    y = torch.addcmul(shift, standardized, scale).reshape(x.shape)
    return y if how.layout != "position" or how.has_kernel or not x.is_contiguous() else y.contiguous()
