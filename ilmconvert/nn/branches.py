"""The predictor in the fused paths: its branches for scale and shift as a batch of two or one network, both ways.

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


class JoinedBranches(NamedTuple):
    """Both branches as one network of twice the width, whose weights are block-diagonal.

    A matrix product over many instances takes its time from the number of its columns: of few key groups, half as many
    products with twice the columns take less than half of it. What belongs to one instance lies side by side here.

    Attributes:
        features, decoded: as those of :class:`Branches`, ``(2, M, K)``, but :func:`side_by_side`.
        decoders: as they were applied, ``(2 e, 2 K)``.
        hidden: the embeddings, ``(2 e, M)``.
    """

    features: Tensor
    decoders: Tensor
    hidden: Tensor
    decoded: Tensor

    @classmethod
    def of(cls, features: Tensor, meta: Sequence[Tensor], tanh: Callable[[Tensor], Tensor]) -> JoinedBranches:
        """The forward pass; ``meta`` is encoder, scale decoder and shift decoder."""
        encoder, scale_decoder, shift_decoder = meta
        decoders = torch.block_diag(halved(scale_decoder).T, shift_decoder.T)
        hidden = torch.relu(torch.block_diag(encoder, encoder) @ _joined(features).T)
        return cls(features, decoders, hidden, _parted(tanh(hidden.T @ decoders)))

    def backward(self, d_scale: Tensor, d_shift: Tensor, encoder: Tensor, share: float) -> tuple[Tensor, ...]:
        """As :meth:`Branches.backward`."""
        (e, k), features, decoded = encoder.shape, _joined(self.features), _joined(self.decoded)
        d_z = _joined(side_by_side(d_scale, d_shift)) * (1 - decoded * decoded)
        d_hidden = torch.ops.aten.threshold_backward(self.decoders @ d_z.T, self.hidden, 0)
        d_features = d_hidden.T @ torch.block_diag(encoder, encoder) * share
        d_encoder, d_decoders = d_hidden @ features, (self.hidden @ d_z).T
        blocks = d_decoders[:k, :e], d_decoders[k:, e:]
        d_scale_decoder, d_shift_decoder = (d.clone(memory_format=torch.contiguous_format) for d in blocks)
        return _parted(d_features), d_encoder[:e, :k] + d_encoder[e:, k:], halved(d_scale_decoder), d_shift_decoder


def side_by_side(of_scale: Tensor, of_shift: Tensor) -> Tensor:
    """Two ``(M, K)`` as one ``(2, M, K)``, in memory ``(M, 2, K)``."""
    return torch.stack((of_scale, of_shift), 1).transpose(0, 1)


def _joined(x: Tensor) -> Tensor:
    """A ``(2, M, K)`` that lies :func:`side_by_side` as what it is in memory, the matrix ``(M, 2 K)``."""
    return x.transpose(0, 1).flatten(1)


def _parted(x: Tensor) -> Tensor:
    """The matrix again as ``(2, M, K)``."""
    return x.view(len(x), 2, -1).transpose(0, 1)


def _tanh_backward(d_scale: Tensor, d_shift: Tensor, decoded: Tensor) -> Tensor:
    if torch.compiler.is_compiling():  # a stack of what the caller summed would be a pass of its own
        return torch.stack([d * (1 - value * value) for d, value in zip((d_scale, d_shift), decoded, strict=True)])
    return torch.ops.aten.tanh_backward(torch.stack((d_scale, d_shift)), decoded)  # type: ignore[no-any-return]


def _decoders_backward(d: Tensor, hidden: Tensor, decoders: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the embeddings, and of both decoders as the parameters lie: ``(2, K, e / B)``."""
    _, width, keys = decoders.shape
    blocks = hidden.shape[1] // width
    if blocks == 1:
        d_decoders = torch.bmm(hidden, d)  # (2, e, K)
        one = 1 in d_decoders.shape[1:]  # then a view has the strides of a parameter, which DDP's buckets ask for
        return torch.bmm(decoders, d.mT), d_decoders.view(2, keys, width) if one else d_decoders.mT
    d, hidden = d.unflatten(2, (blocks, -1)), hidden.unflatten(1, (blocks, -1))
    d_hidden = torch.einsum("nmbo,nibo->nbim", d, decoders.unflatten(2, (blocks, -1)))
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
