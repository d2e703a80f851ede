"""A diff on the terminal: the library's plain text, coloured by the mark in its first column."""

from __future__ import annotations

from ilmconvert_cli.render.console import stdout
from rich.text import Text

__all__ = ["print_diff"]

_STYLES = {"+": "green", "-": "red", "~": "yellow", ">": "cyan", "=": "cyan"}


def print_diff(text: str) -> None:
    """Print line by line; what the output's encoding lacks is printed as an escape."""
    out = stdout()
    for line in text.splitlines():
        safe = line.encode(out.encoding, "backslashreplace").decode(out.encoding)
        style = "dim" if safe.lstrip().startswith("...") else _STYLES.get(safe[:1], "")
        out.print(Text(safe, style=style), soft_wrap=True)
