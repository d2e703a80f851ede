"""``recover``: bring a converted model back to its original, or on to labels."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ilmconvert.errors import UsageError
from ilmconvert.graph.inputs import check_model
from ilmconvert.options import Progress
from ilmconvert.training.data import Images, open_images
from ilmconvert.training.options import RecoverOptions
from ilmconvert.training.processes import processes
from ilmconvert.training.result import Evaluation, Recovery
from ilmconvert.training.trainer import Listener, Trainer

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["recover"]


def recover(
    original: nn.Module | None,
    converted: nn.Module,
    images: Images,
    options: RecoverOptions | None = None,
    *,
    labels: bool = False,
    held_out_images: Images | None = None,
    run_folder: str | Path | None = None,
    resume: bool = False,
    progress: Progress | None = None,
    on_evaluation: Callable[[Evaluation], None] | None = None,
    **fields: Any,
) -> Recovery:
    """Train a copy of ``converted`` until it answers as ``original`` does, without labels; or train it on labels.

    The original, in evaluation mode, answers the same augmented images as the model in training. Agreement on held-out
    images is measured at the start and at intervals; the best candidate is returned, and the start is the first one. So
    the result is never worse than ``converted`` on them: by agreement, then by KL (with labels: by accuracy, then by
    cross-entropy).

    Under ``torchrun`` or ``accelerate launch`` every process calls it alike, and gets the same result.

    Args:
        original: the teacher; not used with labels, and may be None then.
        converted: the model to train; it is left as it is.
        images: a folder of images (any depth; broken ones are reported and skipped), an
            :class:`~ilmconvert.images.ImageBatches`, a map-style dataset, a tensor ``(N, 3, H, W)`` or an iterable of
            such batches, which is read into memory once. Only a folder is augmented.
        options: how to train, or its fields as keywords (``minutes=15``, ``lr=1e-4``, ...).
        labels: train on class numbers: a folder for each class, a dataset of pairs, or an iterable of pairs of batches.
        held_out_images: measure on these instead of a share of ``images``.
        run_folder: where the run's state is kept after each measurement; None keeps none.
        resume: go on with the run in ``run_folder``; it takes the course it would have taken without the break. Images
            that are no files must be the same ones: of them, only the number is compared.
        progress: called with (what, done, total).
        on_evaluation: called with each measurement of this session, in the main process.

    Raises:
        UsageError: options, images, labels or models that do not go together.
        CheckpointError: nothing to resume, or a run of another model, other images or other options.
        IlmconvertError: ``accelerate`` is not installed.

    Example:
        >>> import ilmconvert, timm
        >>> model = timm.create_model("test_resnet", num_classes=4)
        >>> converted = ilmconvert.convert(model).model
        >>> recovery = ilmconvert.recover(model, converted, torch.randn(12, 3, 32, 32), steps=2, batch_size=4)
        >>> recovery.report.best.merit >= recovery.report.start.merit
        True
    """
    wanted = RecoverOptions.of(options, fields)
    check_model(converted)
    if original is not None:
        check_model(original)
    if original is None and not labels:
        raise UsageError("expected the original to learn from, got None; give it, or labels=True")
    if wanted.features and labels:
        raise UsageError("expected features=0 with labels, since features are compared with the original's")
    if wanted.temperature != 1 and labels:
        raise UsageError("expected temperature=1 with labels, since it is of logits compared with the original's")
    if wanted.label_smoothing and not labels:
        raise UsageError("expected labels=True with label_smoothing, which is of the cross-entropy with them")
    if resume and run_folder is None:
        raise UsageError("expected run_folder with resume=True: the folder of the run to go on with")
    data = open_images(images, converted, wanted, labels=labels, held_out=held_out_images)
    folder = None if run_folder is None else Path(run_folder)

    def train(accelerator: Accelerator) -> Recovery:  # a function, so that the trainer is gone before the processes are
        listener = Listener(progress, on_evaluation) if accelerator.is_main_process else Listener()
        trainer = Trainer(accelerator, None if labels else original, converted, data, wanted, listener)
        if resume and folder is not None:
            trainer.resume(folder)
        return trainer.train(folder)

    with processes(wanted) as accelerator, torch.inference_mode(False), torch.enable_grad():
        return train(accelerator)
