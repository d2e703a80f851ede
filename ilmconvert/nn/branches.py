"""The predictor in the fused paths: its branches for scale and shift as one batch of two, forward and backward.

Between two convolutions nothing of a small operation is in any cache, and what a layer costs is then the number of
*kinds* of operation it uses rather than their size. So both branches go through the same few: matrix products, sums and
products, and the two activations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ilmconvert.nn.functional import decode, halved, joined_decoders

__all__ = ["Branches"]


class Branches(NamedTuple):
    """Both branches, that of the scale first, and what they keep for their backward pass.

    Attributes:
        features: what they were shown, ``(2, M, K)``, see :func:`ilmconvert.nn.functional.key_features`.
        decoders: as they were applied, see :func:`ilmconvert.nn.functional.joined_decoders`.
        hidden: the embeddings, ``(2, e, M)``.
        decoded: ``2 D_scale - 1`` and ``D_shift``, ``(2, M, K)``.
    """

    features: Tensor
    decoders: Tensor
    hidden: Tensor
    decoded: Tensor

    @classmethod
    def of(cls, features: Tensor, meta: Sequence[Tensor], tanh: Callable[[Tensor], Tensor] = torch.tanh) -> Branches:
        """The forward pass; ``meta`` is encoder, scale decoder and shift decoder."""
        encoder, *own = meta
        decoders = joined_decoders(*own)
        return cls(features, decoders, *decode(features, encoder, decoders, tanh))

    def backward(self, d_scale: Tensor, d_shift: Tensor, encoder: Tensor, share: float) -> tuple[Tensor, ...]:
        """Gradients of the features (times ``share``), encoder, scale decoder and shift decoder.

        Args:
            d_scale, d_shift: those of ``2 D_scale - 1`` and ``D_shift``, ``(M, K)``.
            encoder: the encoder.
            share: a factor that the caller would apply; here a matrix product takes it along.
        """
        d_z = _tanh_backward(d_scale, d_shift, self.decoded)
        d_hidden, d_decoders = _decoders_backward(d_z, self.hidden, self.decoders)
        d_hidden = torch.ops.aten.threshold_backward(d_hidden, self.hidden, 0)
        d_features, d_encoder = _encoder_backward(d_hidden, self.features, encoder, share)
        d_scale_decoder, d_shift_decoder = d_decoders.unbind()
        return d_features, d_encoder, halved(d_scale_decoder), d_shift_decoder


def _tanh_backward(d_scale: Tensor, d_shift: Tensor, decoded: Tensor) -> Tensor:
    if torch.compiler.is_compiling():  # a stack of what the caller summed would be a pass of its own
        return torch.stack([d * (1 - value * value) for d, value in zip((d_scale, d_shift), decoded, strict=True)])
    return torch.ops.aten.tanh_backward(torch.stack((d_scale, d_shift)), decoded)  # type: ignore[no-any-return]


def _decoders_backward(d: Tensor, hidden: Tensor, decoders: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the embeddings and of both decoders."""
    blocks = hidden.shape[1] // decoders.shape[2]
    if blocks == 1:
        d_decoders = torch.bmm(hidden, d)  # (2, e, K)
        one = 1 in d_decoders.shape[1:]  # then a view has the strides of a parameter, which DDP's buckets ask for
        return torch.bmm(decoders.mT, d.mT), d_decoders.view(decoders.shape) if one else d_decoders.mT
    d, hidden = d.unflatten(2, (blocks, -1)), hidden.unflatten(1, (blocks, -1))
    d_hidden = torch.einsum("nmbo,nboi->nbim", d, decoders.unflatten(1, (blocks, -1)))
    return d_hidden.flatten(1, 2), torch.einsum("nmbo,nbim->nboi", d, hidden).flatten(1, 2)


def _encoder_backward(d: Tensor, features: Tensor, encoder: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Gradients of the features, times ``share``, and of the encoder."""
    blocks = features.shape[2] // encoder.shape[1]
    if blocks == 1:
        d_features = torch.baddbmm(features, d.mT, encoder.expand(2, -1, -1), beta=0, alpha=share)
        return d_features, torch.bmm(d, features).sum(0)
    d, features = d.unflatten(1, (blocks, -1)), features.unflatten(2, (blocks, -1))
    d_features = torch.einsum("nbom,boi->nmbi", d, (encoder * share).unflatten(0, (blocks, -1)))
    return d_features.flatten(2).contiguous(), torch.einsum("nbom,nmbi->boi", d, features).flatten(0, 1)
