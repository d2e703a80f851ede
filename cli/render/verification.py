"""The outcome of a verification."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ilmconvert_cli.render.console import stdout
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from ilmconvert.verification import Verification

__all__ = ["print_verification"]

_MARKS = {True: "[green]ok[/]", False: "[bold red]FAILED[/]", None: "-"}


def print_verification(result: Verification) -> None:
    """One row for each check, then the verdict."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("check", "result", "detail"):
        table.add_column(title, overflow="fold")
    for check in result.checks:
        table.add_row(check.name, _MARKS[check.passed], escape(check.detail))
    out = stdout()
    out.print(table)
    out.print("\n[green]all checks passed[/]" if result.passed else "\n[bold red]verification failed[/]")
