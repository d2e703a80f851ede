"""A diff in Markdown, for a pull request: totals, what happened how often, and every change in a folded table."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ilmconvert.comparison.render.words import (
    class_change,
    counts_line,
    differences,
    frequent,
    numbers,
    outputs,
    printable,
    state_dict,
    totals,
)
from ilmconvert.comparison.value import GraphDiff

__all__ = ["markdown"]

_SHOWN = 20  # rows that stand in the open
_ROOM = 60_000  # bytes; a comment on GitHub may have 65,536 characters
_ROOM_FOR_NOTES = 5_000
_ROOM_FOR_KINDS = 10_000


def markdown(diff: GraphDiff) -> str:
    """Headline, totals, kinds of change, rows."""
    parts = [f"### {_text(diff.before.name)} → {_text(diff.after.name)}"]
    parts.append("The two models have the same structure." if diff.equal else f"{counts_line(diff)}.")
    if cells := totals(diff):
        parts.append(_table(("", "before", "after", ""), [list(row) for row in cells]))
    for error in dict.fromkeys(graph.run_error for graph in (diff.before, diff.after) if graph.run_error):
        parts.append(f"Could not be run for shapes and counts: {_text(error)}")
    if diff.numerics is not None:
        parts.append(f"Outputs: {_text(outputs(diff))} (on {_text(diff.numerics.inputs)}).")
        parts += _fitting([_text(note) for note in diff.numerics.notes], _ROOM_FOR_NOTES, "notes")
    if not diff.equal:
        parts.append(f"State dict: {state_dict(diff)}.")
        kinds = [[_text(what), f"{n:,}"] for what, n in frequent(diff)]
        parts.append(_table(("change", "times"), kinds, _ROOM_FOR_KINDS, "kinds"))
        parts.append(_changes(diff, _ROOM - len("\n\n".join(parts).encode())))
    return "\n\n".join(parts) + "\n"


def _changes(diff: GraphDiff, room: int) -> str:
    titles = ["", "path", "class", "differences"] + (["activations"] if diff.numerics else [])
    lines = differences(diff)
    rows = [_row(diff, i, lines[i])[: len(titles)] for i, row in enumerate(diff.rows) if row.changes]
    table = _table(titles, rows, room, "changes; --format html shows them all")
    if len(rows) <= _SHOWN:
        return table
    return f"<details><summary>{len(rows):,} changes</summary>\n\n{table}\n\n</details>"


def _row(diff: GraphDiff, index: int, lines: list[str]) -> list[str]:
    row = diff.rows[index]
    return [
        ", ".join(row.changes),
        _code(row.path or "(the model)"),
        _code(class_change(diff, row)),
        "<br>".join(map(_text, lines)),
        numbers(row),
    ]


def _table(titles: Sequence[str], rows: list[list[str]], room: int = _ROOM, what: str = "rows") -> str:
    head = ["| " + " | ".join(titles) + " |", "| " + " | ".join("---" for _ in titles) + " |"]
    lines = _fitting(["| " + " | ".join(cells) + " |" for cells in rows], room, what)
    return "\n".join(head + lines)


def _fitting(lines: list[str], room: int, what: str) -> list[str]:
    """The first lines that have room together, in bytes, and how many are left out."""
    shown: list[str] = []
    for line in lines:
        room -= len(line.encode()) + 2
        if room < 0:
            return [*shown, f"\n{len(lines) - len(shown):,} more {what}"]
        shown.append(line)
    return shown


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
