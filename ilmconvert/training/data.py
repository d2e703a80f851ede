"""The images of a recovery: what to train on and what to measure on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset, Subset, TensorDataset

from ilmconvert.errors import UsageError
from ilmconvert.images import ImageBatches, image_batches
from ilmconvert.training.options import RecoverOptions
from ilmconvert.training.stream import ImageFiles

__all__ = ["ImageData", "Images", "class_names", "open_images"]

Images = str | Path | ImageBatches | Tensor | Dataset[Any] | Iterable[Any]


@dataclass(frozen=True)
class ImageData:
    """What is trained on and what is measured on.

    Attributes:
        train, held_out: map-style datasets of images, or of (image, class number).
        classes: the names of the classes, where folders tell them.
        digest: tells these files, in this order, from others; of images that are no files it knows the number.
    """

    train: Dataset[Any]
    held_out: Dataset[Any]
    classes: tuple[str, ...] | None = None
    digest: str = ""


def open_images(
    images: Images, model: nn.Module, options: RecoverOptions, *, labels: bool, held_out: Images | None = None
) -> ImageData:
    """Find the images and hold some out.

    Args:
        images: a folder, an :class:`ImageBatches`, a map-style dataset of tensors ``(3, H, W)``, a tensor
            ``(N, 3, H, W)``, or an iterable of such batches, which is read into memory once. With labels: a folder with
            a folder for each class, a dataset of pairs, or an iterable of pairs of batches. Only a folder is augmented;
            an :class:`ImageBatches` is trained on with its own transform.
        model: its timm config gives size and normalization for files.
        options: size and augmentation for folders, the share held out, the seed.
        labels: whether class numbers are wanted.
        held_out: measure on these instead of a share of ``images``.

    Raises:
        UsageError: too few images, no labels, or an input of another kind.
    """
    if held_out is not None:
        train, measured = (_source(part, model, options, labels) for part in (images, held_out))
    else:
        train = _source(images, model, options, labels)
        train, measured = _split(train, options)
    files = _all_files(train, measured)
    classes = class_names(files) if labels and files else None
    digest = sha256("\n".join([*_names(train), "held out", *_names(measured)]).encode()).hexdigest()[:16]
    if isinstance(images, (str, Path)) and options.augment:
        train = _augmented(train, model, options)
    return ImageData(_dataset(train, classes), _dataset(measured, classes), classes, digest)


def _source(images: Images, model: nn.Module, options: RecoverOptions, labels: bool) -> ImageBatches | Dataset[Any]:
    if isinstance(images, (str, Path)):
        found = image_batches(images, model, seed=options.seed, input_size=options.input_size)
        if labels and (loose := next((f for f in found.files if f.parent == Path(images)), None)):
            raise UsageError(f"expected a folder for each class in {str(images)!r}, found images beside them: {loose}")
        return found
    if isinstance(images, ImageBatches):
        return images
    if isinstance(images, Tensor):
        images = [images]
    by_batch = isinstance(images, (list, tuple, IterableDataset))
    if hasattr(images, "__getitem__") and hasattr(images, "__len__") and not by_batch:
        return images  # type: ignore[return-value]  # a map-style dataset
    if not isinstance(images, Iterable):
        raise UsageError(f"expected a folder, a dataset, a tensor or batches of images, got {type(images).__name__}")
    batches = [batch if isinstance(batch, (tuple, list)) else (batch,) for batch in images]
    if not batches or not all(_is_batch(batch[: 1 + labels], 1 + labels) for batch in batches):
        wanted = "pairs of batches (images, class numbers)" if labels else "tensors (N, 3, H, W)"
        raise UsageError(f"expected an iterable of {wanted}, got {len(batches)} batches of another form")
    if len(sizes := {tuple(batch[0].shape[1:]) for batch in batches}) > 1:
        raise UsageError(f"expected batches of images of one size, got {' and '.join(map(str, sorted(sizes)[:2]))}")
    columns = [torch.cat([batch[i] for batch in batches]) for i in range(1 + labels)]
    return TensorDataset(*columns)


def _is_batch(parts: Sequence[Any], wanted: int) -> bool:
    """Whether there are as many tensors as wanted, of one length."""
    tensors = [part for part in parts if isinstance(part, Tensor) and part.ndim]
    return len(tensors) == wanted and len({len(tensor) for tensor in tensors}) == 1


def _split(source: Any, options: RecoverOptions) -> tuple[Any, Any]:
    """A share held out, the same one for the same images and seed."""
    count = len(source.files) if isinstance(source, ImageBatches) else len(source)
    share = min(options.held_out, options.MOST_HELD_OUT / max(count, 1))
    if isinstance(source, ImageBatches):
        return source.split(share)
    if count < 2:
        raise UsageError(f"expected at least 2 images, so that some can be held out, got {count}")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(options.seed)).tolist()
    held = min(max(round(share * count), 1), count - 1)
    return Subset(source, order[held:]), Subset(source, order[:held])


def class_names(files: Iterable[Path]) -> tuple[str, ...]:
    """The classes of images in a folder for each class, in timm's order: ``2`` before ``10``.

    Example:
        >>> class_names([Path("images/10/a.png"), Path("images/2/b.png"), Path("images/2/c.png")])
        ('2', '10')
    """
    from timm.utils.misc import natural_key

    return tuple(sorted({file.parent.name for file in files}, key=natural_key))


def _all_files(*parts: Any) -> list[Path]:
    return [file for part in parts if isinstance(part, ImageBatches) for file in part.files]


def _augmented(train: Any, model: nn.Module, options: RecoverOptions) -> Any:
    """The training images with timm's training transform."""
    from timm.data import create_transform, resolve_model_data_config

    config = resolve_model_data_config(model)
    strength = options.augment
    narrow = 1 + strength / 3
    transform = create_transform(
        input_size=options.input_size or config["input_size"],
        is_training=True,
        scale=(1 - 0.92 * strength, 1.0),
        ratio=(1 / narrow, narrow),
        color_jitter=0.4 * strength,
        **{name: config[name] for name in ("interpolation", "mean", "std")},
    )
    return replace(train, transform=transform)


def _dataset(part: Any, classes: tuple[str, ...] | None) -> Dataset[Any]:
    if not isinstance(part, ImageBatches):
        return part  # type: ignore[no-any-return]
    numbers = {name: number for number, name in enumerate(classes or ())}
    targets = None if classes is None else tuple(numbers[file.parent.name] for file in part.files)
    return ImageFiles(part.files, part.transform, targets)


def _names(part: Any) -> list[str]:
    return (
        ["/".join(file.parts[-2:]) for file in part.files] if isinstance(part, ImageBatches) else [f"{len(part)} items"]
    )
