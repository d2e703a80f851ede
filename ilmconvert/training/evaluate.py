"""Measuring on the held-out images."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ilmconvert.errors import IlmconvertError, UsageError
from ilmconvert.graph.inputs import first_tensor
from ilmconvert.metrics import Comparison, Score, Scoring, Similarity, class_logits, logits_of
from ilmconvert.training.data import ImageData
from ilmconvert.training.options import RecoverOptions
from ilmconvert.training.stream import Batch, held_out_loader
from ilmconvert.wording import brief

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["Judge", "answers", "labels_of"]

_LEFT_OUT = -100  # the class number that torch's cross-entropy passes over


def answers(model: nn.Module, images: Tensor) -> Tensor:
    """The logits of a model, whatever device, dtype and output it has; it may change its (copy of the) images."""
    like = first_tensor(model)
    return logits_of(model(images.clone() if like is None else images.to(like.device, like.dtype, copy=True)))


def labels_of(batch: Batch, logits: Tensor) -> Tensor:
    """The class numbers of a batch, on the logits' device.

    Raises:
        UsageError: there are none, or they are not those of the model's classes.
    """
    labels, classes = batch.labels, class_logits(logits).shape[1]
    if labels is None:
        raise UsageError("expected images with class numbers, got images alone; give pairs (image, class number)")
    if labels.is_floating_point():
        raise UsageError(f"expected class numbers to be integers, got {labels.dtype}; give labels.long()")
    if wrong := labels[(labels != _LEFT_OUT) & ((labels < 0) | (labels >= classes))].tolist():
        raise UsageError(
            f"expected class numbers from 0 to {classes - 1}, for the model's {classes} classes, got {wrong[0]}"
        )
    return labels.to(logits.device).long()


class Judge:
    """Measure models on this process's share of the held-out images, and add up over the processes.

    The models are whole ones (no DDP, no shards), so the processes need not have the same number of batches. The
    original's answers are computed once.

    Args:
        data: the images.
        options: batch size and workers.
        original: what to compare with; None measures against labels.
        accelerator: of this process.
        on_broken: told of files that cannot be read.
    """

    def __init__(
        self,
        data: ImageData,
        options: RecoverOptions,
        original: nn.Module | None,
        accelerator: Accelerator,
        on_broken: Callable[[dict[str, str]], None],
    ) -> None:
        ranks = accelerator.process_index, accelerator.num_processes
        self._loader = held_out_loader(data.held_out, options, *ranks)
        self._classes, self._device, self._on_broken = data.classes, accelerator.device, on_broken
        self._original = original
        self._wanted: list[Tensor | None] = []

    @torch.no_grad()
    def check(self, model: nn.Module) -> None:
        """Run the first batch through the original and a model, which is in evaluation mode afterwards.

        Raises:
            ModelError: the outputs are no logits.
            UsageError: the images are none that the models take.
        """
        images = next((batch.images for batch in self._loader if batch.images is not None), None)
        if images is None:
            return
        try:
            for each in (self._original, model.eval()):
                if each is not None:
                    answers(each, images)
        except IlmconvertError:
            raise
        except Exception as error:  # a forward pass may raise anything
            raise UsageError(
                f"expected images that {type(model).__name__} can be called with: items (3, H, W) of a dataset, or "
                f"batches (N, 3, H, W) of any other iterable; a batch of them, {tuple(images.shape)}, ends in "
                f"{brief(error, 200)}"
            ) from error

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> Similarity | Score:
        """The figures of a model, which is in evaluation mode afterwards.

        Raises:
            ModelError: the outputs are no logits.
            UsageError: no held-out image can be read, or the classes are not those of the model.
        """
        model.eval()
        comparison, scoring = Comparison(self._device), Scoring(self._device)
        broken: dict[str, str] = {}
        for number, batch in enumerate(self._loader):
            broken |= batch.broken
            self._on_broken(batch.broken)
            if batch.images is None:
                continue
            got = answers(model, batch.images)
            if self._original is not None:
                comparison.update(self._reference(self._original, number, batch.images).to(got.device), got)
            else:
                scoring.update(got, self._labels(batch, got).to(got.device))
        sums = (scoring if self._original is None else comparison).reduce()
        if not sums.answers:
            told = "; ".join(f"{file}: {reason}" for file, reason in list(broken.items())[:3])
            raise UsageError(
                f"expected readable images to measure on, but no held-out one can be ({told or 'there are none'}); "
                "hold out more (held_out), or give others (held_out_images)"
            )
        return sums.result()

    def _reference(self, original: nn.Module, number: int, images: Tensor) -> Tensor:
        self._wanted += [None] * (number + 1 - len(self._wanted))
        if (known := self._wanted[number]) is None:
            known = self._wanted[number] = answers(original, images).cpu()
        return known

    def _labels(self, batch: Batch, logits: Tensor) -> Tensor:
        classes = class_logits(logits).shape[1]
        if self._classes is not None and len(self._classes) != classes:
            raise UsageError(
                f"expected a folder for each of the model's {classes} classes, found {len(self._classes)}; "
                f"give the model a head for them first: model.reset_classifier({len(self._classes)}) "
                "(--reset-classifier on the command line)"
            )
        return labels_of(batch, logits)
