"""The auto-encoder of ILM-Norm that predicts the rescaling from an instance's key features (paper, section 3.3).

One encoder ``E`` (e x K) is shared by two decoders (K x e); none has a bias::

    h(u) = relu(E u)
    D_scale = sigmoid(W_scale h(s))        s: variance of each key group
    D_shift = tanh(W_shift h(m))           m: mean of each key group

:class:`MetaPredictor` returns ``D_scale - 1/2``, which is ``tanh(z / 2) / 2`` for the decoder's output ``z``: a silent
decoder then contributes an exact zero, and the layer's ``weight`` is the scale that remains.

Two extensions of the paper. *Standardized keys*: the features are deviations and means, less a fixed center over a
fixed scale, so that encoder and decoders work on small numbers whatever the units of the network. *Blocks*: encoder
and decoders are block-diagonal, each block serving its own key groups; ``K`` blocks cost ``6 K`` weights instead of
``6 K^2``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ilmconvert.nn.functional import key_features, predict

__all__ = ["MetaPredictor"]


class Matrix(nn.Module):
    """A weight ``(rows, columns)``.

    It is no ``nn.Linear``, so that whatever quantizes, adapts or initializes every Linear of a network leaves it alone.
    """

    def __init__(self, rows: int, columns: int, device: torch.device | None, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, columns, device=device, dtype=dtype))

    def extra_repr(self) -> str:
        """Its sizes."""
        return f"{self.weight.shape[0]}, {self.weight.shape[1]}"


@torch.no_grad()
def _init(weight: Tensor) -> None:
    """Initialize a weight ``(..., columns)`` as ``nn.Linear`` does."""
    bound = 1 / math.sqrt(weight.shape[-1])
    nn.init.uniform_(weight, -bound, bound)


class MetaPredictor(nn.Module):
    """Predict per-key-group corrections of scale and shift.

    Args:
        num_key_groups: ``K``, the number of key groups.
        hidden_features: ``e``, the width of the embedding.
        num_blocks: blocks ``B`` of encoder and decoders; 1 is the paper.
        standardized_keys: hold ``key_center`` and ``key_scale``, two buffers ``(2, K)`` for deviation and mean.
        device, dtype: of the weights.

    Shape:
        - means, variances (deviations with standardized keys): ``(..., K)``
        - output: two tensors ``(..., K)``, in (-1/2, 1/2) and (-1, 1).

    Raises:
        ValueError: blocks that do not divide ``K`` and ``e``.

    Example:
        >>> import torch
        >>> scale, shift = MetaPredictor(4, 2)(torch.zeros(3, 4), torch.ones(3, 4))
        >>> tuple(scale.shape), tuple(shift.shape)
        ((3, 4), (3, 4))
    """

    key_center: Tensor | None
    key_scale: Tensor | None

    def __init__(
        self,
        num_key_groups: int,
        hidden_features: int,
        *,
        num_blocks: int = 1,
        standardized_keys: bool = False,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_blocks < 1 or num_key_groups % num_blocks or hidden_features % num_blocks:
            raise ValueError(
                f"expected num_blocks to divide {num_key_groups} key groups and {hidden_features} hidden features, "
                f"got {num_blocks}"
            )
        self.num_blocks = num_blocks
        keys, hidden = num_key_groups // num_blocks, hidden_features // num_blocks
        self.encoder = Matrix(hidden_features, keys, device, dtype)
        self.scale_decoder = Matrix(num_key_groups, hidden, device, dtype)
        self.shift_decoder = Matrix(num_key_groups, hidden, device, dtype)
        shape = (2, num_key_groups)
        for name, make in (("key_center", torch.zeros), ("key_scale", torch.ones)):
            self.register_buffer(name, make(shape, device=device, dtype=dtype) if standardized_keys else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start as the authors' layers do."""
        for matrix in (self.encoder, self.scale_decoder, self.shift_decoder):
            _init(matrix.weight)

    @torch.no_grad()
    def silence(self) -> None:
        """Zero both decoders and pair the encoder's rows with their negatives.

        The output is exactly zero, yet both decoders receive gradient from any input: of two opposite rows, the ReLU
        passes one.
        """
        weight = self._blocks(self.encoder)
        half = weight.new_empty(len(weight), math.ceil(weight.shape[1] / 2), weight.shape[2])
        _init(half)
        weight.copy_(torch.cat([half, -half], 1)[:, : weight.shape[1]])
        nn.init.zeros_(self.scale_decoder.weight)
        nn.init.zeros_(self.shift_decoder.weight)

    @torch.no_grad()
    def detect(self) -> None:
        """Let each key group's own features through: ``D_scale - 1/2 = tanh(s) / 2`` and ``D_shift = tanh(m)``.

        Two units of opposite sign carry a feature through the ReLU, so ``e`` must be ``2 K`` at least.

        Raises:
            ValueError: the embedding is too narrow.
        """
        encoder = self._blocks(self.encoder)
        width, keys = encoder.shape[1:]
        if width < 2 * keys:
            raise ValueError(f"expected at least {2 * keys} hidden features for {keys} key groups, got {width}")
        if width > 2 * keys:  # units are left over
            self.silence()
        eye = torch.eye(keys, dtype=encoder.dtype, device=encoder.device)
        pairs = torch.cat([eye, -eye])
        encoder[:, : 2 * keys] = pairs
        self._blocks(self.scale_decoder)[..., : 2 * keys] = 2 * pairs.T
        self._blocks(self.shift_decoder)[..., : 2 * keys] = pairs.T

    def _blocks(self, matrix: Matrix) -> Tensor:
        return matrix.weight.view(self.num_blocks, -1, matrix.weight.shape[1])

    def weights(self) -> tuple[Tensor, Tensor, Tensor]:
        """Encoder, scale decoder, shift decoder."""
        return self.encoder.weight, self.scale_decoder.weight, self.shift_decoder.weight

    def forward(self, means: Tensor, variances: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``D_scale - 1/2`` and ``D_shift``, computed in the dtype of the key features."""
        spreads, centers = (t.reshape(-1, t.shape[-1]) for t in (variances, means))
        scale, shift = predict(key_features(spreads, centers, self.key_center, self.key_scale), self.weights())
        return scale.reshape(means.shape), shift.reshape(means.shape)
