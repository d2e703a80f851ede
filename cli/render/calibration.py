"""The outcome of a calibration."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ilmconvert_cli.render.console import stdout
from rich.markup import escape
from rich.table import Table

from ilmconvert.wording import plural

if TYPE_CHECKING:
    from ilmconvert.calibration import CalibrationReport

__all__ = ["print_calibration"]


def print_calibration(report: CalibrationReport, broken: dict[Path, str]) -> None:
    """One row for each layer, the comparison with the original, and what could not be read."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("layer", "channels", "explained before", "after", "kept their start"):
        table.add_column(title, overflow="fold", justify="left" if title == "layer" else "right")
    for site in report.sites:
        table.add_row(
            escape(site.path),
            str(site.channels),
            _percent(site.fit.explained_before),
            _percent(site.fit.explained_after),
            str(len(site.fit.degenerate) or "-"),
        )
    out = stdout()
    out.print(table)
    out.print(f"\n{escape(str(report))}", soft_wrap=not out.is_terminal)
    if broken:
        out.print(f"[yellow]{plural(len(broken), 'file')} could not be read:[/]")
    for file, reason in broken.items():
        out.print(f"  {escape(str(file))}: {escape(reason)}", soft_wrap=True)


def _percent(share: float) -> str:
    return f"{100 * share:.4f} %" if share >= -1 else "< -100 %"
