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
    figures = {"agreement": "kl", "accuracy": "loss"}
    name = next(name for name in figures if hasattr(evaluation.measured, name))
    second = figures[name]
    if evaluation.step == 0:
        stdout().print(f"[bold]{'step':>7} {'epoch':>7} {'training loss':>14} {name:>11} {second:>9}[/]")
    loss = "-" if evaluation.loss is None else f"{evaluation.loss:.4g}"
    value = getattr(evaluation.measured, second)
    stdout().print(
        f"{evaluation.step:>7} {evaluation.epoch:>7.1f} {loss:>14} {100 * evaluation.top1:>9.1f} % {value:>9.4g}"
    )


def print_recovery(report: RecoveryReport) -> None:
    """What was won, and what to be careful of."""
    first, *rest = str(report).split("\n")
    out = stdout()
    out.print(f"\n[bold]{escape(first)}[/]")
    for line in rest:
        out.print(escape(line), soft_wrap=not out.is_terminal)
