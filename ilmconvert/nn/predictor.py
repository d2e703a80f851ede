"""The auto-encoder of ILM-Norm that predicts the rescaling from an instance's key features (paper, section 3.3).

One encoder ``E`` (e x K) is shared by two decoders (K x e); none has a bias::

    h(u) = relu(E u)
    D_scale = sigmoid(W_scale h(s))        s: variance of each key group
    D_shift = tanh(W_shift h(m))           m: mean of each key group

:class:`MetaPredictor` returns ``D_scale - 1/2``, which is ``tanh(z / 2) / 2`` for the decoder's output ``z``: a silent
decoder then contributes an exact zero, and the layer's ``weight`` is the scale that remains.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ilmconvert.nn.functional import predict

__all__ = ["MetaPredictor"]


class MetaPredictor(nn.Module):
    """Predict per-key-group corrections of scale and shift.

    Args:
        num_key_groups: ``K``, the number of key groups.
        hidden_features: ``e``, the width of the embedding.
        device, dtype: of the three weights.

    Shape:
        - means, variances: ``(..., K)``
        - output: two tensors ``(..., K)``, in (-1/2, 1/2) and (-1, 1).

    Example:
        >>> import torch
        >>> scale, shift = MetaPredictor(4, 2)(torch.zeros(3, 4), torch.ones(3, 4))
        >>> tuple(scale.shape), tuple(shift.shape)
        ((3, 4), (3, 4))
    """

    def __init__(
        self,
        num_key_groups: int,
        hidden_features: int,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.encoder = nn.Linear(num_key_groups, hidden_features, bias=False, device=device, dtype=dtype)
        self.scale_decoder = nn.Linear(hidden_features, num_key_groups, bias=False, device=device, dtype=dtype)
        self.shift_decoder = nn.Linear(hidden_features, num_key_groups, bias=False, device=device, dtype=dtype)

    @torch.no_grad()
    def silence(self) -> None:
        """Zero both decoders and pair the encoder's rows with their negatives.

        The output is exactly zero, yet both decoders receive gradient from any input: of two opposite rows, the ReLU
        passes one.
        """
        weight = self.encoder.weight
        half = torch.empty(math.ceil(weight.shape[0] / 2), weight.shape[1], device=weight.device, dtype=weight.dtype)
        nn.init.kaiming_uniform_(half, a=math.sqrt(5))
        weight.copy_(torch.cat([half, -half])[: weight.shape[0]])
        nn.init.zeros_(self.scale_decoder.weight)
        nn.init.zeros_(self.shift_decoder.weight)

    def weights(self) -> tuple[Tensor, Tensor, Tensor]:
        """Encoder, scale decoder, shift decoder."""
        return self.encoder.weight, self.scale_decoder.weight, self.shift_decoder.weight

    def forward(self, means: Tensor, variances: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``D_scale - 1/2`` and ``D_shift``, computed in the dtype of the key features."""
        _, decoded = predict(torch.stack((variances, means)).reshape(2, -1, means.shape[-1]), self.weights())
        return decoded[0].reshape(means.shape) / 2, decoded[1].reshape(means.shape)
