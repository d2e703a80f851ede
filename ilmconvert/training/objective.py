"""The loss of one batch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ilmconvert.errors import UsageError
from ilmconvert.graph.shadow import copy_model
from ilmconvert.metrics import class_logits
from ilmconvert.training.evaluate import answers, labels_of
from ilmconvert.training.losses import FeatureMatching, distillation
from ilmconvert.training.options import RecoverOptions
from ilmconvert.training.stream import Batch

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["Objective", "freeze_unreached_"]


class Objective:
    """Distillation from the original on the same images, or cross-entropy where there is no original.

    Args:
        accelerator: gives the precision of the forward passes.
        original: the teacher, in evaluation mode; None for labels.
        student: the module whose ILM layers are listened to for feature matching.
        options: temperature, weight of the features, label smoothing.
    """

    def __init__(
        self, accelerator: Accelerator, original: nn.Module | None, student: nn.Module, options: RecoverOptions
    ) -> None:
        self._accelerator, self.original, self._options = accelerator, original, options
        self._matching = FeatureMatching(original, student) if original is not None and options.features else None

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """The loss of ``model``, which may be wrapped (DDP).

        Raises:
            UsageError: no image could be read, or class numbers are missing or not the model's.
        """
        if batch.images is None:
            raise UsageError("expected readable images to train on, got none")
        if self.original is None:
            return self._labelled(model, batch, batch.images)
        if self._matching is None:
            return self._distilled(self.original, model, batch.images)
        with self._matching as matching:
            distance = self._distilled(self.original, model, batch.images)
            return distance + self._options.features * matching.loss()

    def _labelled(self, model: nn.Module, batch: Batch, images: Tensor) -> Tensor:
        got = class_logits(self._answers(model, images))
        return F.cross_entropy(got, labels_of(batch, got), label_smoothing=self._options.label_smoothing)

    def _distilled(self, original: nn.Module, model: nn.Module, images: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = self._answers(original, images)
        return distillation(wanted, self._answers(model, images), self._options.temperature)

    def _answers(self, model: nn.Module, images: Tensor) -> Tensor:
        with self._accelerator.autocast():
            return answers(model, images).float()


def freeze_unreached_(
    accelerator: Accelerator, original: nn.Module | None, student: nn.Module, options: RecoverOptions, batch: Batch
) -> None:
    """Switch off ``requires_grad`` where the loss gives no gradient, found out on a copy: DDP waits for all others."""
    probe = copy_model(student)
    Objective(accelerator, original, probe, options)(probe, batch).backward()
    reached = {name for name, parameter in probe.named_parameters() if parameter.grad is not None}
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(name in reached)
