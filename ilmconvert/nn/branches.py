"""The predictor in the fused paths: its branches for scale and shift, one after the other, forward and backward.

Between two convolutions nothing of a small operation is in any cache, and what a layer costs is then the number of
*kinds* of operation it uses rather than their number. So both branches are written with few kinds: matrix products,
products and sums, and the two activations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ilmconvert.nn.functional import decode

__all__ = ["Branch", "Branches"]

_Activation = Callable[[Tensor], Tensor]


class Branch(NamedTuple):
    """One branch and what it keeps for its backward pass, see :func:`ilmconvert.nn.functional.decode`.

    Attributes:
        feature: what it was shown, ``(M, K)``.
        hidden: the embedding, ``(M, e)``.
        decoded: ``(M, K)``; the prediction is ``factor`` times it.
    """

    feature: Tensor
    hidden: Tensor
    decoded: Tensor

    @classmethod
    def of(cls, feature: Tensor, encoder: Tensor, decoder: Tensor, factor: float, tanh: _Activation) -> Branch:
        """The branch's forward pass."""
        return cls(feature, *decode(feature, encoder, decoder, factor, tanh))

    def backward(self, d: Tensor, encoder: Tensor, decoder: Tensor, share: float) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of feature (times ``share``), encoder and decoder from those of the prediction, ``(M, K)``.

        All of them over ``factor**2``: constants are left for where they meet small matrices.
        """
        d_z = torch.ops.aten.tanh_backward(d, self.decoded)
        d_hidden, d_decoder = _linear_backward(d_z, self.hidden, decoder)
        d_hidden = torch.ops.aten.threshold_backward(d_hidden, self.hidden, 0)
        d_feature, d_encoder = _linear_backward(d_hidden, self.feature, encoder * share)
        return d_feature, d_encoder, d_decoder


class Branches(NamedTuple):
    """Both branches, which share the encoder; ``meta`` is encoder, scale decoder and shift decoder."""

    scale: Branch
    shift: Branch

    @classmethod
    def of(cls, features: tuple[Tensor, Tensor], meta: Sequence[Tensor], tanh: _Activation = torch.tanh) -> Branches:
        """As :func:`ilmconvert.nn.functional.predict`."""
        encoder, scale_decoder, shift_decoder = meta
        scale = Branch.of(features[0], encoder, scale_decoder, 0.5, tanh)
        return cls(scale, Branch.of(features[1], encoder, shift_decoder, 1.0, tanh))

    @classmethod
    def kept(cls, tensors: Sequence[Tensor]) -> Branches:
        """From the tensors of both, one after the other."""
        return cls(Branch(*tensors[:3]), Branch(*tensors[3:]))

    def backward(
        self, d_scale: Tensor, d_shift: Tensor, meta: Sequence[Tensor], shares: tuple[float, float]
    ) -> tuple[Tensor, ...]:
        """Gradients of both features, times ``shares``, of the encoder and of both decoders."""
        encoder, scale_decoder, shift_decoder = meta
        d_first, d_encoder_too, d_scale_decoder = self.scale.backward(d_scale, encoder, scale_decoder, shares[0] / 4)
        d_second, d_encoder, d_shift_decoder = self.shift.backward(d_shift, encoder, shift_decoder, shares[1])
        return d_first, d_second, d_encoder.add_(d_encoder_too, alpha=0.25), d_scale_decoder * 0.25, d_shift_decoder


def _linear_backward(d: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of ``x`` and ``weight``."""
    blocks = x.shape[1] // weight.shape[1]
    if blocks == 1:
        return torch.mm(d, weight), torch.mm(d.t(), x)
    d, x = (t.unflatten(1, (blocks, -1)) for t in (d, x))
    d_x = torch.einsum("mbo,boi->mbi", d, weight.unflatten(0, (blocks, -1)))
    return d_x.flatten(1), torch.einsum("mbo,mbi->boi", d, x).flatten(0, 1)
