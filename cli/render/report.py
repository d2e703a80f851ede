"""Tables and summary of a report."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from ilmconvert_cli.opening import sample_inputs
from ilmconvert_cli.render.console import stdout
from rich.markup import escape
from rich.table import Table

from ilmconvert.checkpoint.card import load_call
from ilmconvert.checkpoint.folder import saved_source
from ilmconvert.report import describe_target
from ilmconvert.wording import plural

if TYPE_CHECKING:
    from torch import nn

    from ilmconvert.plan import Decision
    from ilmconvert.report import Report
    from ilmconvert.sources import Source

__all__ = ["print_saved", "print_sites", "print_summary"]


def print_sites(report: Report) -> None:
    """One row for each norm, in execution order."""
    if not report.plan.decisions:
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("path", "norm", "shape", "input", "becomes"):
        table.add_column(title, overflow="fold", no_wrap=title in ("shape", "input"))
    for decision in report.plan.decisions:
        table.add_row(*(escape(cell) for cell in _row(decision)))
    stdout().print(table)


def _row(decision: Decision) -> tuple[str, ...]:
    site = decision.site
    aliases = f" (= {', '.join(site.paths[1:])})" if len(site.paths) > 1 else ""
    shapes = " ".join("x".join(map(str, shape)) for shape in site.input_shapes) or "?"
    channels = "x".join(map(str, site.spec.shape)) if site.spec else "-"
    if decision.action == "skip":
        outcome = f"skipped: {decision.reason}"
    else:
        outcome = "; ".join((describe_target(decision), *decision.notes))
    return f"{site.path or '(the model)'}{aliases}", site.class_name, channels, shapes, outcome


def print_summary(report: Report, *, would: bool = False) -> None:
    """What becomes of the norms, what it costs, and what to be careful of."""
    out = stdout()
    verb = "would be converted" if would else "converted"
    counts = f"{plural(len(report.converted), 'norm')} {verb}, {len(report.skipped)} skipped"
    out.print(f"\n[bold]{escape(report.plan.model)}[/]: {counts}")
    for norm, target, count in report.conversions():
        out.print(f"  [green]{count} x {escape(norm)} -> {escape(target)}[/]")
    for norm, reason, count in report.skips():
        out.print(f"  [yellow]skipped {count} x {escape(norm)}: {escape(reason)}[/]")
    adjusted = [d for d in report.converted if d.notes]
    if adjusted:
        out.print(f"  {len(adjusted)} adjusted, such as {escape(adjusted[0].path)}: {escape(adjusted[0].notes[0])}")
    pieces = len(report.plan.untraced)
    if pieces:
        out.print(
            f"  {plural(pieces, 'module')} could not be traced by torch.fx; their norms were found piece by piece"
        )
    out.print(f"  parameters added: {report.added_parameters:,} ({report.added_percent:.2f} %)")
    if report.start:
        out.print(f"  {escape(report.start)}", soft_wrap=not out.is_terminal)
    for warning in report.warnings:
        out.print(f"[bold yellow]warning:[/] {escape(warning)}", soft_wrap=not out.is_terminal)


def print_saved(folder: Path, model: nn.Module, input_size: tuple[int, ...] | None = None) -> None:
    """Where the result is and what to do with it."""
    out, source = stdout(), saved_source(folder)
    use = f"use it:   model = {load_call(str(folder), source)}"
    if source is None:
        lines = [use, "check it: ilmconvert.verify(the_rebuilt_original.eval(), model)"]
    else:
        lines = [f"check it: ilmconvert verify {shlex.quote(str(folder))}{_options(source, model, input_size)}", use]
    out.print(f"\nsaved to {folder}", markup=False)
    for line in lines:
        out.print(f"  {line}", markup=False, soft_wrap=True)


def _options(source: Source, model: nn.Module, input_size: tuple[int, ...] | None) -> str:
    """What ``verify`` has to be told; a size to fill in where neither the model nor the user names one."""
    size = ",".join(map(str, input_size)) if input_size else "" if sample_inputs(model, None) else "C,H,W"
    return (" --trust-factory" if source.kind == "factory" else "") + (f" --input-size {size}" if size else "")
