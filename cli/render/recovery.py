"""The course and the outcome of a recovery."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ilmconvert_cli.render.console import stdout
from rich.markup import escape

if TYPE_CHECKING:
    from ilmconvert.training import Evaluation, RecoveryReport

__all__ = ["print_evaluation", "print_recovery"]


def print_evaluation(evaluation: Evaluation) -> None:
    """One line for a measurement, as it happens; titles before the first."""
    if evaluation.step == 0:
        name, second = evaluation.measured.FIGURES
        stdout().print(f"[bold]{'step':>7} {'epoch':>7} {'training loss':>14} {name:>11} {second:>9}[/]")
    loss = "-" if evaluation.loss is None else f"{evaluation.loss:.4g}"
    figures = f"{100 * evaluation.top1:>9.1f} % {evaluation.distance:>9.4g}"
    stdout().print(f"{evaluation.step:>7} {evaluation.epoch:>7.1f} {loss:>14} {figures}")


def print_recovery(report: RecoveryReport) -> None:
    """What was won, and what to be careful of."""
    first, *rest = str(report).split("\n")
    out = stdout()
    out.print(f"\n[bold]{escape(first)}[/]")
    for line in rest:
        out.print(escape(line), soft_wrap=not out.is_terminal)
