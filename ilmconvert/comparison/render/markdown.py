"""A diff in Markdown, for a pull request: totals, what happened how often, and every change in a folded table."""

from __future__ import annotations

import re

from ilmconvert.comparison.render.words import class_change, counts_line, details, frequent, numbers, printable, totals
from ilmconvert.comparison.value import GraphDiff, Row

__all__ = ["markdown"]

_SHOWN = 20  # rows that stand in the open


def markdown(diff: GraphDiff) -> str:
    """Headline, totals, kinds of change, rows."""
    parts = [f"### {_text(diff.before.name)} → {_text(diff.after.name)}"]
    parts.append("The two models have the same structure." if diff.equal else f"{counts_line(diff)}.")
    if cells := totals(diff):
        parts.append(_table(("", "before", "after", ""), [list(row) for row in cells]))
    for error in dict.fromkeys(graph.run_error for graph in (diff.before, diff.after) if graph.run_error):
        parts.append(f"Could not be run for shapes and counts: {_text(error)}")
    if diff.numerics is not None:
        parts.append(f"Activations compared on {_text(diff.numerics.inputs)}.")
        parts += [_text(note) for note in diff.numerics.notes]
    if not diff.equal:
        parts.append(_table(("change", "times"), [[_text(what), f"{n:,}"] for what, n in frequent(diff)]))
        parts.append(_changes(diff))
    return "\n\n".join(parts) + "\n"


def _changes(diff: GraphDiff) -> str:
    titles = ["", "path", "class", "differences"] + (["activations"] if diff.numerics else [])
    table = _table(tuple(titles), [_row(diff, row)[: len(titles)] for row in diff.changed])
    if len(diff.changed) <= _SHOWN:
        return table
    return f"<details><summary>all {len(diff.changed):,} changes</summary>\n\n{table}\n\n</details>"


def _row(diff: GraphDiff, row: Row) -> list[str]:
    differences = "<br>".join(_text(line) for line in details(diff, row))
    return [
        ", ".join(row.changes),
        _code(row.path or "(the model)"),
        _code(class_change(diff, row)),
        differences,
        numbers(row),
    ]


def _table(titles: tuple[str, ...], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(titles) + " |", "| " + " | ".join("---" for _ in titles) + " |"]
    return "\n".join(lines + ["| " + " | ".join(cells) + " |" for cells in rows])


def _text(text: str) -> str:
    """Text that Markdown and HTML leave alone."""
    escaped = re.sub(r"([\\`*_{}\[\]()#|~!<>&])", r"\\\1", printable(text))
    return (
        escaped.replace("\\<", "&lt;")
        .replace("\\>", "&gt;")
        .replace("\\&", "&amp;")
        .replace("\\(", "(")
        .replace("\\)", ")")
    )


def _code(text: str) -> str:
    """A code span, whatever backticks are in it; a bar would end the table's cell."""
    text = printable(text)
    fence = "`" * (max((len(run) for run in re.findall("`+", text)), default=0) + 1)
    pad = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{pad}{text}{pad}{fence}".replace("|", "\\|")
