"""Datasets as streams of batches.

Order, augmentation and substitution of broken files are functions of the seed and of an image's place in the endless
stream of training images, or among those held out. So a run that goes on from step ``n``, with any number of processes
or workers, sees what it would have seen without the break.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from ilmconvert.errors import UsageError
from ilmconvert.images import UNREADABLE, read_image
from ilmconvert.training.options import RecoverOptions
from ilmconvert.wording import one_line

__all__ = ["Batch", "ImageFiles", "held_out_loader", "training_stream"]


@dataclass(frozen=True)
class Batch:
    """Images ``(B, 3, H, W)``, their class numbers ``(B,)`` if known, and the files that could not be read."""

    images: Tensor | None
    labels: Tensor | None
    broken: dict[str, str]


@dataclass(frozen=True)
class ImageFiles(Dataset[Any]):
    """Images in files, with class numbers where they are known."""

    files: tuple[Path, ...]
    transform: Any
    targets: tuple[int, ...] | None = None

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Any:
        image = self.transform(read_image(self.files[index]))
        return image if self.targets is None else (image, self.targets[index])


@dataclass(frozen=True)
class _Draws(Dataset[Batch]):
    """Items of a dataset by (index, seed): random transforms become a function of the seed."""

    source: Any

    def __getitem__(self, key: tuple[int, int]) -> Batch:
        index, seed = key
        broken: dict[str, str] = {}
        with _seeded(seed):
            for shift in range(len(self.source)):
                item, unread = _read(self.source, (index + shift) % len(self.source))
                broken |= unread
                if item is not None:
                    return _batch(item, broken)
        first = next((f"; the first is {file!r}: {reason}" for file, reason in broken.items()), "")
        raise UsageError(f"expected images that can be read, but none of {len(self.source)} can{first}")


@dataclass(frozen=True)
class _InOrder(Dataset[Batch]):
    """Items of a dataset, the same at every pass: random transforms draw from the seed. A broken file gives none."""

    source: Any
    indices: Sequence[int]
    seed: int

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Batch:
        with _seeded((self.seed << 32) + self.indices[index]):
            item, broken = _read(self.source, self.indices[index])
        return Batch(None, None, broken) if item is None else _batch(item, broken)


def _read(source: Any, index: int) -> tuple[Any, dict[str, str]]:
    if not isinstance(source, ImageFiles):
        return source[index], {}
    try:
        return source[index], {}
    except UNREADABLE as error:
        return None, {str(source.files[index]): one_line(error)}


def _batch(item: Any, broken: dict[str, str]) -> Batch:
    image, label = (item[0], item[1] if len(item) > 1 else None) if isinstance(item, (tuple, list)) else (item, None)
    if not isinstance(image, Tensor):
        raise UsageError(f"expected the dataset to give image tensors, got {type(image).__name__}; add a transform")
    return Batch(image.unsqueeze(0), None if label is None else torch.as_tensor(label).unsqueeze(0), broken)


def _collate(items: list[Batch]) -> Batch:
    read = [item for item in items if item.images is not None]
    images = torch.cat([item.images for item in read if item.images is not None]) if read else None
    labels = [item.labels for item in read if item.labels is not None]
    broken = {file: reason for item in items for file, reason in item.broken.items()}
    return Batch(images, torch.cat(labels) if labels else None, broken)


@dataclass(frozen=True)
class _Stream(Sampler[list[tuple[int, int]]]):
    """The endless stream of training batches from a step on: each epoch a new order, batches across epochs."""

    images: int
    batch_size: int
    seed: int
    start: int
    rank: int
    world_size: int
    _order: Any = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_order", lru_cache(maxsize=2)(self._shuffled))

    def _shuffled(self, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed((self.seed << 32) + epoch)
        return torch.randperm(self.images, generator=generator).tolist()

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        step = self.start
        while True:
            slots = range(step * self.batch_size + self.rank, (step + 1) * self.batch_size, self.world_size)
            places = [divmod(slot, self.images) for slot in slots]
            yield [
                (self._order(epoch)[i], (self.seed << 32) + slot)
                for slot, (epoch, i) in zip(slots, places, strict=True)
            ]
            step += 1


def training_stream(
    images: Dataset[Any], options: RecoverOptions, start: int, rank: int, world_size: int
) -> Iterator[Batch]:
    """One process's share of the training batches from step ``start`` on, without end.

    Raises:
        UsageError: the batch cannot be shared out evenly.
    """
    if options.batch_size % world_size:
        raise UsageError(
            f"expected a batch_size that {world_size} processes can share evenly, got {options.batch_size}"
        )
    size = len(images)  # type: ignore[arg-type]
    stream = _Stream(size, options.batch_size, options.seed, start, rank, world_size)
    return iter(_loader(_Draws(images), options, batch_sampler=stream))


def held_out_loader(images: Dataset[Any], options: RecoverOptions, rank: int, world_size: int) -> Iterable[Batch]:
    """One process's share of the held-out images, in order; every pass gives the same batches."""
    indices = range(rank, len(images), world_size)  # type: ignore[arg-type]
    return _loader(
        _InOrder(images, indices, options.seed), options, batch_size=max(options.batch_size // world_size, 1)
    )


def _loader(dataset: Dataset[Batch], options: RecoverOptions, **how: Any) -> DataLoader[Batch]:
    generator = torch.Generator().manual_seed(options.seed)  # the loader's own draws do not touch the global state
    return DataLoader(dataset, collate_fn=_collate, num_workers=options.workers, generator=generator, **how)


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed the three generators that transforms draw from, and put them back afterwards."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
