"""The libraries whose models a survey knows: one file for each, imported when it is asked for."""

from __future__ import annotations

import importlib
from fnmatch import fnmatchcase
from typing import Protocol

from torch import nn

from ilmconvert.errors import IlmconvertError, UsageError
from ilmconvert.graph import Inputs

__all__ = ["LIBRARIES", "Library", "library", "matching"]

LIBRARIES = ("timm", "torchvision", "transformers", "segmentation_models_pytorch")


class Library(Protocol):
    """What a library's file has to offer."""

    def names(self) -> list[str]:
        """All models, in a fixed order."""

    def build(self, name: str) -> nn.Module:
        """A model with fresh weights, on torch's default device."""

    def inputs(self, name: str, model: nn.Module, batch_size: int, *, training: bool) -> Inputs:
        """What to call it with."""

    def needs_values(self, name: str) -> bool:
        """Whether its forward pass depends on values, so that meta tensors cannot run it."""


def library(name: str) -> Library:
    """The library called ``name``.

    Raises:
        UsageError: there is no file for it.
        IlmconvertError: it is not installed.
    """
    if name not in LIBRARIES:
        raise UsageError(f"expected a library among {', '.join(LIBRARIES)}; got {name!r}")
    try:
        module: Library = importlib.import_module(f"{__name__}.of_{name}")
    except ImportError as error:
        raise IlmconvertError(
            f"expected {name} to be installed, but: {error}. Install it with pip install 'ilmconvert[survey]'"
        ) from error
    return module


def matching(name: str, patterns: tuple[str, ...]) -> list[str]:
    """The models of a library that match any of the shell patterns; all without patterns."""
    return [n for n in library(name).names() if not patterns or any(fnmatchcase(n, p) for p in patterns)]
