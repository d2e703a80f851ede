"""What a norm module computes, as plain data."""

from __future__ import annotations

from dataclasses import dataclass, field

from ilmconvert.nn.functional import Standardization

__all__ = ["NormSpec"]


@dataclass(frozen=True)
class NormSpec:
    """A norm's function without its tensors; it pickles, prints and goes into a plan.

    Attributes:
        shape: the channels ``(C,)``, or the whole ``normalized_shape``.
        num_groups: groups of stage 1; None where the norm uses batch statistics and the grouping is a choice.
        standardization: stage 1 of the ILM layer that takes the norm's place.
        weight, bias: whether the norm has a scale and a shift.
        spatial_ndim: spatial dimensions of the input the class takes, where the class fixes them.
        has_act: followed by dropout and activation inside the module (``drop`` and ``act``).
        preserves: the ILM layer can start with exactly the norm's output. False for batch statistics.
        fixed_statistics: in evaluation it applies statistics of its own, from which a predictor can be set up.

    Example:
        >>> how = Standardization(layout="token", eps=1e-6)
        >>> NormSpec((64,), 1, how, bias=False).num_channels  # a Layer Norm over 64 values, without shift
        64
    """

    shape: tuple[int, ...]
    num_groups: int | None
    standardization: Standardization = field(default_factory=Standardization)
    weight: bool = True
    bias: bool = True
    spatial_ndim: int | None = None
    has_act: bool = False
    preserves: bool = True
    fixed_statistics: bool = False

    @property
    def num_channels(self) -> int:
        """``C``."""
        return self.shape[0]
