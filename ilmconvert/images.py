"""Folders of images as batches, read with timm's own transforms for a model."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from ilmconvert.errors import UsageError
from ilmconvert.wording import one_line

__all__ = ["UNREADABLE", "ImageBatches", "image_batches", "image_files", "read_image"]

UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)  # PIL's, for damaged or huge files
Transform = Callable[[Any], Tensor]


@dataclass(frozen=True)
class ImageBatches:
    """Batches of images; every pass over it reads the same files in the same order.

    Attributes:
        files: what is read, in this order.
        transform: from a PIL image to a tensor ``(3, H, W)``.
        batch_size: images in a batch; the last one may have fewer.
        broken: files that could not be read, with the reason; they are left out. Filled while reading.
    """

    files: tuple[Path, ...]
    transform: Transform
    batch_size: int = 32
    broken: dict[Path, str] = field(default_factory=dict, compare=False)

    def __iter__(self) -> Iterator[Tensor]:
        """Tensors ``(B, 3, H, W)`` of float32.

        Raises:
            UsageError: not one of the files can be read.
        """
        batch: list[Tensor] = []
        for file in self.files:
            if (image := self._read(file)) is not None:
                batch.append(image)
            if len(batch) == self.batch_size:
                yield torch.stack(batch)
                batch = []
        if batch:
            yield torch.stack(batch)
        if self.files and self.broken.keys() >= set(self.files):
            file = self.files[0]
            raise UsageError(
                f"expected images that can be read, but none of {len(self.files)} files can; the first is "
                f"{str(file)!r}: {self.broken[file]}"
            )

    def _read(self, file: Path) -> Tensor | None:
        if file in self.broken:
            return None
        try:
            return self.transform(read_image(file))
        except UNREADABLE as error:
            self.broken[file] = one_line(error)
            return None

    def split(self, held_out: float) -> tuple[ImageBatches, ImageBatches]:
        """These images in two parts: all but a share, and that share (at least one image each).

        Args:
            held_out: the share of the second part, between 0 and 1.

        Raises:
            UsageError: fewer than two images.
        """
        if len(self.files) < 2:
            raise UsageError(f"expected at least 2 images, so that some can be held out, got {len(self.files)}")
        count = min(max(round(held_out * len(self.files)), 1), len(self.files) - 1)
        return replace(self, files=self.files[:-count]), replace(self, files=self.files[-count:])

    def share(self, rank: int, world_size: int) -> ImageBatches:
        """The images that one of several processes takes: every ``world_size``-th, from ``rank`` on."""
        return replace(self, files=self.files[rank::world_size])


def image_batches(
    folder: str | Path,
    model: nn.Module,
    *,
    batch_size: int = 32,
    limit: int | None = None,
    seed: int = 0,
    input_size: tuple[int, ...] | None = None,
) -> ImageBatches:
    """The images under a folder, at any depth, unlabelled, in an order drawn from ``seed``.

    Args:
        folder: where to look; files are taken by timm's image suffixes.
        model: its ``pretrained_cfg`` gives size, crop, interpolation, mean and standard deviation, as timm resolves
            them (ImageNet's for a model that has none).
        batch_size: images in a batch.
        limit: take this many files only.
        seed: of the order.
        input_size: ``(3, H, W)`` instead of the model's own size.

    Raises:
        UsageError: no such folder, no image in it, or a number out of range.

    Example:
        >>> import tempfile, timm, PIL.Image
        >>> folder = tempfile.mkdtemp()
        >>> PIL.Image.new("RGB", (40, 30)).save(f"{folder}/black.png")
        >>> [tuple(batch.shape) for batch in image_batches(folder, timm.create_model("test_resnet"))]
        [(1, 3, 160, 160)]
    """
    for name, number in (("batch_size", batch_size), ("limit", limit)):
        if number is not None and number < 1:
            raise UsageError(f"expected {name} to be at least 1, got {number}")
    if input_size is not None and (len(input_size) != 3 or input_size[0] != 3):
        raise UsageError(f"expected an input size (3, H, W) for images, got {tuple(input_size)}")
    from timm.data import create_transform, resolve_model_data_config

    files = image_files(folder)
    random.Random(seed).shuffle(files)
    config = resolve_model_data_config(model)
    if input_size is not None:
        config["input_size"] = input_size
    return ImageBatches(tuple(files[:limit]), create_transform(**config), batch_size)


def image_files(folder: str | Path) -> list[Path]:
    """All image files under a folder, sorted.

    Raises:
        UsageError: no such folder, or no image in it.
    """
    from timm.data import get_img_extensions

    root = Path(folder)
    if not root.is_dir():
        raise UsageError(f"expected a folder of images at {str(root)!r}, found {'a file' if root.exists() else 'none'}")
    suffixes = set(get_img_extensions())
    files = sorted(path for path in root.rglob("*") if path.suffix.lower() in suffixes and path.is_file())
    if not files:
        raise UsageError(f"expected images ({', '.join(sorted(suffixes))}) under {str(root)!r}, found none")
    return files


def read_image(file: Path) -> Any:
    """A file as an RGB image of PIL; 16 bits a value are scaled to 8, which PIL alone would clip to white.

    Raises:
        OSError: unreadable, truncated, or no image; or another of ``UNREADABLE``.
        ValueError: 32 bits a value, whose range is not known.
    """
    with Image.open(file) as image:
        if image.mode in ("I", "F"):
            raise ValueError(f"expected 8 or 16 bits a value, got 32, whose range is not known (PIL mode {image.mode})")
        if image.mode.startswith("I;16"):
            return image.convert("I").point(lambda value: value / 257 + 0.5).convert("RGB")
        return image.convert("RGB")
