"""What two models are run on to compare their activations."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ilmconvert.errors import UsageError
from ilmconvert.graph.inputs import Inputs, example_inputs
from ilmconvert.images import image_batches
from ilmconvert.wording import plural

__all__ = ["Batches", "folder_batches", "given_batches", "random_batches"]

_RANDOM_SAMPLES = 4  # in a batch, too: what a large one activates does not fit, and it would run again and again
_IMAGES = 32
_IMAGES_IN_BATCH = 8


@dataclass(frozen=True)
class Batches:
    """Inputs, and what they are in words.

    Attributes:
        batches: what to call both models with, one after the other.
        words: what they are; called at the end, when it is known what could be read.
        notes: called at the end: what could not be read.
        total: how many batches; 0 if unknown.
    """

    batches: Iterable[Inputs]
    words: Callable[[], str]
    notes: Callable[[], tuple[str, ...]] = tuple
    total: int = 0


def random_batches(
    model: nn.Module, *, samples: int | None = None, input_size: tuple[int, ...] | None = None
) -> Batches:
    """Standard normal values from a fixed seed, of the size that ``model`` declares.

    Raises:
        UsageError: it declares none and none is given.
    """
    number = samples or _RANDOM_SAMPLES
    sample = example_inputs(model, input_size=input_size, batch_size=1)
    if sample is None:
        raise UsageError(
            f"expected an input size for {type(model).__name__}, which declares none; give --input-size 3,224,224, or "
            "batches of your own in Python"
        )
    noise = torch.Generator().manual_seed(0)

    def batch(size: int) -> Inputs:
        return sample.map(lambda t: torch.randn((size, *t.shape[1:]), generator=noise).to(t))

    sizes = [min(_RANDOM_SAMPLES, number - done) for done in range(0, number, _RANDOM_SAMPLES)]
    shape = "x".join(map(str, sample.args[0].shape[1:]))
    words = f"{plural(number, 'random input')} of {shape}"
    return Batches(map(batch, sizes), lambda: words, total=len(sizes))


def folder_batches(
    folder: str | Path, model: nn.Module, *, limit: int | None = None, input_size: tuple[int, ...] | None = None
) -> Batches:
    """The images under a folder, as ``model`` wants them.

    Raises:
        UsageError: no such folder, or no image in it.
    """
    limit = limit or _IMAGES
    images = image_batches(folder, model, batch_size=min(_IMAGES_IN_BATCH, limit), limit=limit, input_size=input_size)

    def words() -> str:
        return f"{plural(len(images.files) - len(images.broken), 'image')} from {folder}"

    return Batches(
        (Inputs((batch,)) for batch in images),
        words,
        lambda: tuple(f"not read: {file}: {why}" for file, why in images.broken.items()),
        math.ceil(len(images.files) / images.batch_size),
    )


def given_batches(given: Any, model: nn.Module) -> Batches:
    """What the caller of ``diff`` means: ``"random"``, a folder, :class:`Batches`, or an iterable of batches."""
    if isinstance(given, Batches):
        return given
    if isinstance(given, str) and given == "random":
        return random_batches(model)
    if isinstance(given, Tensor):
        given = [given]
    if isinstance(given, (str, Path)):
        return folder_batches(given, model)
    if not isinstance(given, Iterable) or isinstance(given, dict):
        raise UsageError(
            f"expected numerics to be 'random', a folder or an iterable of batches, got {type(given).__name__}"
        )
    wrapped = (inputs for batch in given if (inputs := example_inputs(model, batch)) is not None)
    return Batches(wrapped, lambda: "the batches given", total=len(given) if isinstance(given, Sized) else 0)
