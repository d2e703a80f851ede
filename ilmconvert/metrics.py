"""How close a converted model's answers are to the original's: figures on logits, and their sums over many batches.

Logits are ``(N, classes, *)``, as :func:`torch.nn.functional.cross_entropy` takes them: further dimensions (pixels,
say) are further answers. With ``p`` and ``q`` the softmax of the original's and the converted model's logits:

=============  ====================================================================================
agreement      how often both have the same largest logit
top-5          how often the original's largest logit is among the converted model's five largest
KL             the mean of ``sum p (log p - log q)``, in nats
cosine         the mean cosine of the angle between the two vectors of logits
=============  ====================================================================================

A single logit is that of a yes, beside a no whose logit is 0: its softmax is the sigmoid, and models agree where it has
one sign.

An answer of the converted model that is not finite agrees with nothing, and makes KL and cosine nan.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ilmconvert.errors import ModelError
from ilmconvert.processes import summed

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = [
    "Comparison",
    "Score",
    "Scoring",
    "Similarity",
    "agreement",
    "class_logits",
    "contained",
    "cosine",
    "kl_divergence",
    "logits_of",
]


@dataclass(frozen=True)
class Similarity:
    """How close two models' answers are, as means over all answers.

    Attributes:
        answers: how many there were.
        agreement: share of equal top-1 answers, 0 to 1.
        top5: share of the original's answers among the converted model's first five, 0 to 1.
        kl: KL(original || converted), nats.
        cosine: of the logits.
    """

    FIGURES: ClassVar = ("agreement", "kl")  # what is compared first, more is better; and second, less is

    answers: int
    agreement: float
    top5: float
    kl: float
    cosine: float


@dataclass(frozen=True)
class Score:
    """How well a model's answers fit labels, as means over all answers.

    Attributes:
        answers: how many there were.
        accuracy: share of the answers that equal the label, 0 to 1.
        loss: cross-entropy, nats.
    """

    FIGURES: ClassVar = ("accuracy", "loss")

    answers: int
    accuracy: float
    loss: float


class _Sums:
    """A count and sums over batches."""

    def __init__(self, figures: int, device: torch.device | str) -> None:
        device = torch.device(device)
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self._sums = torch.zeros(1 + figures, device=device, dtype=dtype)

    def _add(self, *figures: Tensor) -> None:
        columns = (torch.ones_like(figures[0]), *figures)
        self._sums += torch.stack([c.to(self._sums.dtype).sum() for c in columns]).to(self._sums.device)

    def reduce(self) -> Self:
        """Add up the sums of all processes, where ``torch.distributed`` runs; every process calls it, once."""
        summed(self._sums)
        return self

    @property
    def answers(self) -> int:
        """How many there were."""
        return int(self._sums[0])

    def _means(self) -> tuple[int, list[float]]:
        answers, *sums = self._sums.tolist()
        if not answers:
            raise ModelError("expected answers to compare, got none; give at least one image")
        return int(answers), [value / answers for value in sums]


class Comparison(_Sums):
    """Sums over batches, from which :meth:`result` makes the means; independent of how the images are cut.

    Args:
        device: where the sums are kept; with ``torch.distributed``, one that its backend can reduce.

    Example:
        >>> comparison = Comparison()
        >>> original = torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 0.0]])
        >>> comparison.update(original[:2], original[:2])
        >>> comparison.update(original[2:], -original[2:])
        >>> result = comparison.result()
        >>> result.answers, round(result.agreement, 3), round(result.cosine, 3)
        (3, 0.667, 0.333)
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        super().__init__(4, device)

    @torch.no_grad()
    def update(self, original: Tensor, converted: Tensor) -> None:
        """Add a batch of logits ``(N, classes, *)``."""
        pair = original, converted
        self._add(agreement(*pair), contained(*pair), kl_divergence(*pair), cosine(*pair))

    def result(self) -> Similarity:
        """The means so far.

        Raises:
            ModelError: nothing was compared.
        """
        answers, (agreement, top5, kl, cosine) = self._means()
        return Similarity(answers, agreement, top5, max(kl, 0.0), cosine)  # rounding may bring it below 0


class Scoring(_Sums):
    """As :class:`Comparison`, against labels.

    Example:
        >>> scoring = Scoring()
        >>> scoring.update(torch.tensor([[9.0, 0.0], [9.0, 0.0]]), torch.tensor([0, 1]))
        >>> scoring.result().accuracy
        0.5
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        super().__init__(2, device)

    @torch.no_grad()
    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Add a batch of logits ``(N, classes, *)`` and class numbers ``(N, *)``, 0 or 1 for a single logit."""
        labels = labels.reshape(-1)
        self._add(_answers(logits) == labels, F.cross_entropy(_rows(logits), labels, reduction="none"))

    def result(self) -> Score:
        """The means so far.

        Raises:
            ModelError: nothing was scored.
        """
        answers, means = self._means()
        return Score(answers, *means)


def agreement(original: Tensor, converted: Tensor) -> Tensor:
    """Whether the top-1 answers are equal: bool, one for each answer.

    Args:
        original, converted: logits ``(N, classes, *)``.

    Example:
        >>> agreement(torch.tensor([[2.0, 1.0], [0.0, 1.0]]), torch.tensor([[9.0, 0.0], [3.0, 2.0]]))
        tensor([ True, False])
    """
    ours = _answers(converted)
    return (_answers(original) == ours) & (ours >= 0)


def contained(original: Tensor, converted: Tensor, k: int = 5) -> Tensor:
    """Whether the original's top-1 answer is among the converted model's first ``k``: bool, one for each answer.

    Example:
        >>> contained(torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[2.0, 0.0, 1.0]]), k=2)
        tensor([True])
    """
    rows = _rows(converted)
    best = _answers(original).unsqueeze(1)
    return (rows.topk(min(k, rows.shape[1])).indices == best).any(1) & rows.isfinite().all(1)


def kl_divergence(original: Tensor, converted: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(original || converted) of the softmax of ``logits / temperature``, in nats, one for each answer.

    Example:
        >>> p = torch.tensor([[0.75, 0.25]])
        >>> round(kl_divergence(p.log(), torch.zeros(1, 2)).item(), 4)  # log 2 - H(p)
        0.1308
    """
    p, q = ((_rows(logits) / temperature).log_softmax(1) for logits in (original, converted))
    return F.kl_div(q, p, log_target=True, reduction="none").sum(1)


def cosine(original: Tensor, converted: Tensor) -> Tensor:
    """Cosine of the angle between the vectors of logits, one for each answer.

    Example:
        >>> cosine(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]]))
        tensor([0.])
    """
    return F.cosine_similarity(_rows(original), _rows(converted), dim=1)


def logits_of(output: Any) -> Tensor:
    """The logits in what a model returns: a tensor, the first of several, or the entry ``logits`` or ``out``.

    Raises:
        ModelError: there is no such tensor, or it has no class dimension.
    """
    found = output
    if isinstance(output, Mapping):
        found = next((output[key] for key in ("logits", "out") if key in output), None)
    elif hasattr(output, "logits"):
        found = output.logits
    elif isinstance(output, (tuple, list)) and output:
        found = output[0]
    if not isinstance(found, Tensor) or found.ndim < 2:
        shape = f" of shape {tuple(found.shape)}" if isinstance(found, Tensor) else ""
        raise ModelError(
            f"expected the model to return logits (N, classes, ...), or them first or under 'logits' or 'out'; got "
            f"{type(output).__name__}{shape}"
        )
    return found


def class_logits(logits: Tensor) -> Tensor:
    """Logits ``(N, classes, *)`` of two classes at least: a single one gets a no before it, whose logit is 0.

    Example:
        >>> class_logits(torch.tensor([[2.0], [-1.0]])).tolist()
        [[0.0, 2.0], [0.0, -1.0]]
    """
    return logits if logits.shape[1] != 1 else torch.cat((torch.zeros_like(logits), logits), 1)


def _rows(logits: Tensor) -> Tensor:
    """``(N, classes, *)`` to ``(answers, classes)``, two classes and float32 at least."""
    logits = class_logits(logits)
    rows = logits.movedim(1, -1).reshape(-1, logits.shape[1])
    return rows.to(torch.promote_types(rows.dtype, torch.float32))


def _answers(logits: Tensor) -> Tensor:
    """The top-1 answer of each row; -1 where the row is not finite."""
    rows = _rows(logits)
    return rows.argmax(1).where(rows.isfinite().all(1), -1)
