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

from ilmconvert.nn.functional import decode

__all__ = ["Branches"]


class Branches(NamedTuple):
    """Both branches, that of the scale first, and what they keep for their backward pass.

    Attributes:
        features: what they were shown, ``(2, M, K)``, see :func:`ilmconvert.nn.functional.key_features`.
        hidden: the embeddings, ``(2, M, e)``.
        decoded: ``2 D_scale - 1`` and ``D_shift``, ``(2, M, K)``.
    """

    features: Tensor
    hidden: Tensor
    decoded: Tensor

    @classmethod
    def of(cls, features: Tensor, meta: Sequence[Tensor], tanh: Callable[[Tensor], Tensor] = torch.tanh) -> Branches:
        """The forward pass; ``meta`` is encoder, scale decoder and shift decoder."""
        return cls(features, *decode(features, meta, tanh))

    def backward(self, d_scale: Tensor, d_shift: Tensor, meta: Sequence[Tensor], share: float) -> tuple[Tensor, ...]:
        """Gradients of both features (times ``share``), encoder, scale decoder and shift decoder.

        Args:
            d_scale, d_shift: those of ``D_scale`` and ``D_shift``, ``(M, K)``.
            meta: encoder, scale decoder and shift decoder.
            share: a factor that the caller would apply; here it meets a small matrix.
        """
        encoder, scale_decoder, shift_decoder = meta
        decoders = torch.stack((scale_decoder * 0.25, shift_decoder))  # the derivative of tanh(z / 2) / 2
        d_z = torch.ops.aten.tanh_backward(torch.stack((d_scale, d_shift)), self.decoded)
        d_hidden, d_decoders = _decoders_backward(d_z, self.hidden, decoders)
        d_hidden = torch.ops.aten.threshold_backward(d_hidden, self.hidden, 0).flatten(0, 1)
        d_features, d_encoder = _encoder_backward(d_hidden, self.features.flatten(0, 1), encoder, share)
        d_features = d_features.view_as(self.features)
        return d_features[0], d_features[1], d_encoder, d_decoders[0] * 0.25, d_decoders[1]


def _decoders_backward(d: Tensor, hidden: Tensor, decoders: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the embeddings and of both decoders."""
    blocks = hidden.shape[2] // decoders.shape[2]
    if blocks == 1:
        return torch.bmm(d, decoders), torch.bmm(hidden.mT, d).mT  # with many instances, far faster than its transpose
    d, hidden = (t.unflatten(2, (blocks, -1)) for t in (d, hidden))
    d_hidden = torch.einsum("nmbo,nboi->nmbi", d, decoders.unflatten(1, (blocks, -1)))
    return d_hidden.flatten(2), torch.einsum("nmbo,nmbi->nboi", d, hidden).flatten(1, 2)


def _encoder_backward(d: Tensor, features: Tensor, encoder: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Gradients of the features, times ``share``, and of the encoder; both branches in one dimension."""
    blocks = features.shape[1] // encoder.shape[1]
    if blocks == 1:
        return torch.mm(d, encoder * share), torch.mm(d.mT, features)
    d, features = (t.unflatten(1, (blocks, -1)) for t in (d, features))
    d_features = torch.einsum("mbo,boi->mbi", d, (encoder * share).unflatten(0, (blocks, -1)))
    return d_features.flatten(1), torch.einsum("mbo,mbi->boi", d, features).flatten(0, 1)
