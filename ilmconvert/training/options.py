"""What may be chosen for a recovery, checked once."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

from ilmconvert.errors import UsageError
from ilmconvert.options import Options
from ilmconvert.training.groups import META_LR_SCALE

__all__ = ["Precision", "RecoverOptions"]

Precision = Literal["no", "bf16", "fp16"]


@dataclass(frozen=True)
class RecoverOptions(Options):
    """How to train. The run ends at the first limit reached of ``steps``, ``epochs`` and ``minutes``.

    Attributes:
        steps: optimizer steps.
        epochs: passes over the training images. With no limit given, 10.
        minutes: wall time, evaluations included, over all sessions of a resumed run.
        batch_size: images in one optimizer step, shared out between the processes.
        lr: learning rate of AdamW at its highest; see :func:`~ilmconvert.parameter_groups` for the groups.
        meta_lr_scale: learning rate of the ILM layers' meta parameters, relative to ``lr``.
        weight_decay: of convolutions and linear layers.
        warmup: share of the run in which the learning rate rises; then it falls to zero along a cosine.
        clip: largest gradient norm; 0 for no clipping.
        temperature: divides the logits before they are compared (distillation).
        features: weight of the difference between the outputs of the ILM layers and of the modules they replaced.
        label_smoothing: of the cross-entropy (with labels).
        freeze: True trains the ILM layers alone, the rest in evaluation mode; or patterns of parameters to leave.
        augment: strength of timm's random crop, flip and colour jitter, from 0 (the evaluation transform) to 1 (crops
            from 8 % of the area, as in ImageNet training), for images given as a folder.
        input_size: ``(3, H, W)`` instead of the model's own size, for images given as a folder.
        held_out: share of the images kept for measuring, at most :attr:`MOST_HELD_OUT` of them.
        evaluate_every: steps between measurements. None is a twentieth of the run, or 50 where only ``minutes`` limits
            it.
        precision: ``bf16`` or ``fp16`` for automatic mixed precision.
        seed: of the order, the augmentation and dropout, and of which files are held out.
        workers: processes that read images, for each training process.
        fsdp: shard parameters, gradients and optimizer state over the processes (FSDP2) instead of DDP.
        cpu: use the CPU though there is a GPU.

    Raises:
        UsageError: a value out of range.

    Example:
        >>> RecoverOptions(epochs=5, batch_size=64).total_steps(images=1280)
        100
    """

    EXAMPLE = "steps=100, lr=1e-4"
    MOST_HELD_OUT = 2048

    steps: int | None = None
    epochs: float | None = None
    minutes: float | None = None
    batch_size: int = 32
    lr: float = 2e-4
    meta_lr_scale: float = META_LR_SCALE
    weight_decay: float = 0.0
    warmup: float = 0.05
    clip: float = 1.0
    temperature: float = 1.0
    features: float = 0.0
    label_smoothing: float = 0.0
    freeze: bool | str | tuple[str, ...] = False
    augment: float = 0.5
    input_size: tuple[int, ...] | None = None
    held_out: float = 0.1
    evaluate_every: int | None = None
    precision: Precision = "no"
    seed: int = 0
    workers: int = 0
    fsdp: bool = False
    cpu: bool = False

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "evaluate_every"):
            _check(name, getattr(self, name), "at least 1", lambda v: isinstance(v, int) and v >= 1)
        for name in ("epochs", "minutes", "temperature"):
            _check(name, getattr(self, name), "more than 0", lambda v: v > 0)
        for name in ("lr", "meta_lr_scale", "weight_decay", "clip", "features", "workers"):
            _check(name, getattr(self, name), "at least 0", lambda v: v >= 0)
        for name in ("warmup", "label_smoothing", "augment"):
            _check(name, getattr(self, name), "between 0 and 1", lambda v: 0 <= v <= 1)
        _check("seed", self.seed, "at least 0 and below 2^32", lambda v: 0 <= v < 2**32)  # torch's seeds have 64 bits
        _check("held_out", self.held_out, "between 0 and 1, both excluded", lambda v: 0 < v < 1)
        _check(
            "precision", self.precision, f"one of {', '.join(get_args(Precision))}", get_args(Precision).__contains__
        )

    def total_steps(self, images: int) -> int | None:
        """Steps until the limits that count steps; None if there is only the clock."""
        unlimited = self.steps is None and self.epochs is None and self.minutes is None
        epochs = 10.0 if unlimited else self.epochs
        limits = [self.steps] if self.steps else []
        limits += [max(round(epochs * images / self.batch_size), 1)] if epochs else []
        return min(limits, default=None)


def _check(name: str, value: Any, wanted: str, test: Callable[[Any], bool]) -> None:
    if value is not None and not (test(value) and math.isfinite(value if isinstance(value, float) else 0)):
        raise UsageError(f"expected {name} to be {wanted}, got {value!r}")
