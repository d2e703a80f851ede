"""The progress of a survey and what it found."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ilmconvert_cli.render.console import stderr, stdout
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:
    from ilmconvert.survey import Log, Record

__all__ = ["SurveyBar", "print_survey", "survey_bar"]


class SurveyBar:
    """Callbacks for :func:`ilmconvert.survey.run_survey`."""

    def __init__(self, bar: Progress) -> None:
        self.bar, self.task = bar, bar.add_task("starting", total=None)

    def progress(self, running: tuple[str, ...], done: int, total: int) -> None:
        """How far it is and what runs now."""
        self.bar.update(self.task, completed=done, total=total, description=escape(", ".join(running)))

    def tell(self, record: Record) -> None:
        """A line for each model that did not pass, as it comes."""
        if record.status in ("failed", "lost") and self.bar.console.is_terminal:
            self.bar.console.print(f"[bold red]{record.status}[/] {record.name}: {escape(record.reason or '')}")


@contextlib.contextmanager
def survey_bar(*, quiet: bool) -> Iterator[SurveyBar]:
    """A bar on a terminal, with a line for each model that fails."""
    console = stderr()
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    shown = TextColumn("{task.description}")
    console.quiet = quiet
    with Progress(*columns, shown, console=console, transient=True, disable=quiet or not console.is_terminal) as bar:
        yield SurveyBar(bar)


def print_survey(log: Log) -> None:
    """The sums for each library."""
    from ilmconvert.survey.table import Totals

    out = stdout()
    for library in dict.fromkeys(r.library for r in log.records):
        totals = Totals([r for r in log.records if r.library == library])
        table = Table(
            box=None, pad_edge=False, title=f"[bold]{escape(library)}[/]", title_justify="left", show_header=False
        )
        for row in totals.rows():
            table.add_row(*(escape(cell) for cell in row))
        out.print(table)
        for record in totals.failed:
            out.print(f"[bold red]{record.status}[/] {record.name}: {escape(record.reason or '')}", soft_wrap=True)
