"""The account of a recovery: what was measured when, and which moment is kept."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from torch import nn

from ilmconvert.jsonable import to_json
from ilmconvert.metrics import Score, Similarity
from ilmconvert.wording import plural

__all__ = ["Evaluation", "Recovery", "RecoveryReport", "to_jsonl"]

Stop = Literal["done", "diverged"]


@dataclass(frozen=True)
class Evaluation:
    """One measurement on the held-out images.

    Attributes:
        step: optimizer steps so far.
        epoch: passes over the training images so far.
        seconds: wall time so far, in all sessions.
        lr: the learning rate of the step before.
        loss: mean training loss since the last measurement; None at the start.
        measured: the figures.
    """

    step: int
    epoch: float
    seconds: float
    lr: float
    loss: float | None
    measured: Similarity | Score

    @property
    def merit(self) -> tuple[float, float]:
        """What candidates are compared by, larger is better: agreement then KL, or accuracy then loss."""
        first, second = (getattr(self.measured, name) for name in self.measured.FIGURES)
        return tuple(-math.inf if math.isnan(value) else value for value in (first, -second))  # type: ignore[return-value]

    @property
    def top1(self) -> float:
        """Agreement or accuracy, 0 to 1."""
        return self.merit[0]

    @property
    def distance(self) -> float:
        """KL or cross-entropy, nats."""
        return float(getattr(self.measured, self.measured.FIGURES[1]))

    def to_dict(self) -> dict[str, Any]:
        """As flat plain data."""
        data = asdict(self)
        measured = data.pop("measured")
        return {**data, **measured}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Evaluation:
        """Read :meth:`to_dict` back."""
        own = {name: data[name] for name in ("step", "epoch", "seconds", "lr", "loss")}
        rest = {name: value for name, value in data.items() if name not in own}
        return cls(**own, measured=Similarity(**rest) if "kl" in rest else Score(**rest))


def to_jsonl(evaluations: Sequence[Evaluation]) -> str:
    """Evaluations as a log, one JSON object a line."""
    return "".join(to_json(e.to_dict(), indent=None) + "\n" for e in evaluations)


@dataclass(frozen=True)
class RecoveryReport:
    """The account of a whole run.

    Attributes:
        evaluations: from the start on, in order.
        images, held_out: how many images were trained on and measured on.
        trained: parameters that were trained.
        options: what was chosen.
        stopped: ``done``, or ``diverged`` when the loss was no number any more.
        broken: files that could not be read, with the reason.
    """

    evaluations: tuple[Evaluation, ...]
    images: int
    held_out: int
    trained: int
    options: dict[str, Any]
    stopped: Stop = "done"
    broken: dict[str, str] = field(default_factory=dict)

    @property
    def figure(self) -> str:
        """What is compared first: ``agreement`` or ``accuracy``."""
        return self.start.measured.FIGURES[0]

    @property
    def start(self) -> Evaluation:
        """Before the first step: the first candidate."""
        return self.evaluations[0]

    @property
    def best(self) -> Evaluation:
        """The candidate that is kept; of equals, the earliest."""
        return max(self.evaluations, key=lambda e: e.merit)

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        rest = {name: getattr(self, name) for name in ("images", "held_out", "trained", "options", "stopped", "broken")}
        points = {"start": self.start, "best": self.best, "last": self.evaluations[-1]}
        return {**{name: point.to_dict() for name, point in points.items()}, **rest}

    def to_jsonl(self) -> str:
        """The evaluations, one JSON object a line."""
        return to_jsonl(self.evaluations)

    def to_csv(self) -> str:
        """The evaluations as a table."""
        text = io.StringIO()
        writer = csv.DictWriter(text, list(self.start.to_dict()), lineterminator="\n")
        writer.writeheader()
        writer.writerows(e.to_dict() for e in self.evaluations)
        return text.getvalue()

    def __str__(self) -> str:
        start, best, last = self.start, self.best, self.evaluations[-1]
        first, second = start.measured.FIGURES
        lines = [
            f"{first} on {self.held_out} held-out images: {100 * start.top1:.1f} % -> {100 * best.top1:.1f} % "
            f"({second} {start.distance:.4g} -> {best.distance:.4g})",
            f"  best at step {best.step} of {last.step}, {last.epoch:.1f} epochs of {self.images} images",
        ]
        if last.step == 0:
            lines.append("  warning: the time was too short for a single step; give more minutes or hold out less")
        elif best is start:
            lines.append("  warning: no step improved on the start, which is kept")
        if self.stopped == "diverged":
            lines.append("  warning: the loss became infinite or nan; try a smaller learning rate")
        if self.broken:
            file, reason = next(iter(self.broken.items()))
            lines.append(f"  warning: {plural(len(self.broken), 'image')} could not be read, such as {file}: {reason}")
        return "\n".join(lines)


@dataclass(frozen=True)
class Recovery:
    """A trained model and the account of its training.

    Attributes:
        model: a copy of the converted model with the best weights, which may be those of the start; modes, device and
            ``requires_grad`` as given.
        report: what happened.

    Example:
        >>> import ilmconvert, torch
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 4), torch.nn.GroupNorm(2, 8), torch.nn.Flatten())
        >>> converted = ilmconvert.convert(model).model
        >>> recovery = ilmconvert.recover(model, converted, torch.randn(8, 3, 6, 6), steps=2, batch_size=4)
        >>> recovery.report.best.step  # it starts as the original, so that nothing can be better
        0
    """

    model: nn.Module
    report: RecoveryReport
