"""Writing one output file: beside and renamed, and nothing overwritten without being asked."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from ilmconvert.errors import IlmconvertError, OutputExistsError, UsageError

__all__ = ["check_apart", "check_file", "write_file"]


def check_apart(output: Path, *images: Path | None) -> None:
    """Raise unless a folder to save in is outside of the images, among which its own pictures would count.

    Raises:
        UsageError: it is inside, or the same.
    """
    for folder in images:
        if folder is not None and output.resolve().is_relative_to(folder.resolve()):
            raise UsageError(
                f"expected a folder to save in outside of the images in {str(folder)!r}, got {str(output)!r}, whose "
                "pictures (recover.png) would be images of the next run"
            )


def check_file(path: Path, *, force: bool) -> None:
    """Raise unless ``path`` may be written.

    Raises:
        OutputExistsError: it is there already, and ``force`` is False.
        UsageError: it is a folder, or its folder does not exist.
    """
    if path.is_dir():
        raise UsageError(f"expected a file to write, got the folder {str(path)!r}; give a name in it")
    if not path.parent.is_dir():
        raise UsageError(f"expected an existing folder for {path.name!r}, got {str(path.parent)!r}; make it first")
    if path.exists() and not force:
        raise OutputExistsError(f"expected a new file, but {str(path)!r} exists; choose another or give --force")


def write_file(path: Path, content: str | bytes, *, force: bool) -> None:
    """Write all of the content or nothing.

    Raises:
        IlmconvertError: the place cannot be written to.
    """
    check_file(path, force=force)
    data = content.encode("utf-8") if isinstance(content, str) else content
    try:
        with tempfile.NamedTemporaryFile(prefix=f".{path.name[:64]}.", dir=path.parent, delete=False) as beside:
            name = Path(beside.name)
            beside.write(data)
        try:
            mask = os.umask(0)
            os.umask(mask)
            name.chmod(0o666 & ~mask)
            name.replace(path)
        finally:
            name.unlink(missing_ok=True)
    except OSError as error:
        raise IlmconvertError(f"cannot write {str(path)!r}: {error.strerror}") from error
