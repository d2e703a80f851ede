"""The consoles: results on standard output, progress on standard error; plain text where it is no terminal."""

from __future__ import annotations

import sys

from rich.console import Console

__all__ = ["stderr", "stdout"]

_PIPED_WIDTH = 120


def stdout() -> Console:
    """For results. Piped output is not cut to a terminal's width."""
    return Console(width=None if sys.stdout is not None and sys.stdout.isatty() else _PIPED_WIDTH, highlight=False)


def stderr() -> Console:
    """For progress and warnings."""
    return Console(stderr=True, highlight=False)
