"""What the disk refuses, a full one say, as one clear error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from ilmconvert.errors import IlmconvertError
from ilmconvert.wording import one_line

__all__ = ["writing"]


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Work that writes in ``folder``; safetensors has an error of its own for what the disk says.

    Raises:
        IlmconvertError: the disk refuses.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        told = getattr(error, "strerror", None) or one_line(error)
        raise IlmconvertError(f"cannot write in {str(folder)!r}: {told}") from error
