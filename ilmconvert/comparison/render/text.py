"""A diff as a tree in plain text: one line for each changed node, its differences below, what is equal folded."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

from ilmconvert.comparison.render.words import (
    class_change,
    counts_line,
    differences,
    frequent,
    mark,
    numbers,
    outputs,
    parameters_below,
    printable,
    state_dict,
    subtrees,
    totals,
)
from ilmconvert.comparison.value import GraphDiff
from ilmconvert.wording import plural

__all__ = ["summary", "text"]

_STEP = 2
_DEEPEST = 24  # columns of indentation at most
_SUMMARY_LINES = 10


def text(diff: GraphDiff, *, unfold: bool = False, width: int = 80) -> str:
    """The tree; the first column of each line is the mark of what happened.

    Args:
        diff: what to show.
        unfold: show equal nodes too.
        width: columns that no line exceeds.
    """
    notes = [f"  note: {printable(note)}" for note in (diff.numerics.notes if diff.numerics else ())]
    return _fitted([*_head(diff), *notes, "", *_Tree(diff, unfold).lines()], width)


def summary(diff: GraphDiff, *, width: int = 80) -> str:
    """At most ten lines, long ones wrapped."""
    lines = _head(diff)
    often = [f"  {n:,} x {what}" for what, n in frequent(diff)]
    last = f"  state dict: {state_dict(diff)}"
    room = _SUMMARY_LINES - len(lines) - 1
    if len(often) > room:
        rest = sum(n for _, n in frequent(diff)[room - 1 :])
        often = [*often[: room - 1], f"  {rest:,} others"]
    return _fitted([*lines, *often, last], width)


def _head(diff: GraphDiff) -> list[str]:
    same = "the same structure" if diff.equal else counts_line(diff)
    lines = [printable(f"{diff.before.name} -> {diff.after.name}"), f"  {same}"]
    for what, before, after, difference in totals(diff):
        lines.append(f"  {what}: {before}" + (f" -> {after} ({difference})" if difference else ""))
    errors = dict.fromkeys(graph.run_error for graph in (diff.before, diff.after) if graph.run_error)
    if errors:
        lines.append(f"  could not be run for shapes and counts: {printable('; '.join(errors))}")
    if diff.numerics is not None:
        notes = diff.numerics.notes
        noted = f"; {plural(len(notes), 'note')}" if notes else ""
        lines.append(f"  outputs: {outputs(diff)} (on {printable(diff.numerics.inputs)}{noted})")
    return lines


def _fitted(lines: list[str], width: int) -> str:
    """The lines, long ones wrapped and indented further."""
    fitted: list[str] = []
    for line in lines:
        indent = " " * (len(line) - len(line[1:].lstrip()) + 2)  # a mark is no text
        fitted += textwrap.wrap(line, width, subsequent_indent=indent, break_on_hyphens=False) or [""]
    return "".join(f"{line}\n" for line in fitted)


class _Tree:
    def __init__(self, diff: GraphDiff, unfold: bool) -> None:
        self.diff, self.unfold = diff, unfold
        self.differences = differences(diff)
        self.changed, self.sizes = subtrees(diff)

    def lines(self) -> Iterator[str]:
        yield from self._siblings(self.diff.children.get(None, ()), 0)

    def _siblings(self, indexes: tuple[int, ...], depth: int) -> Iterator[str]:
        folded = 0
        for index in indexes:
            if self.changed[index] or self.unfold:
                yield from self._fold(folded, depth)
                folded = 0
                yield from self._row(index, depth)
            else:
                folded += self.sizes[index]
        yield from self._fold(folded, depth)

    def _fold(self, count: int, depth: int) -> Iterator[str]:
        if count:
            yield f"  {self._indent(depth)}... {count:,} unchanged"

    def _row(self, index: int, depth: int) -> Iterator[str]:
        row = self.diff.rows[index]
        a, b = self.diff.nodes(row)
        node = b or a
        whole = row.changes in (("inserted",), ("removed",))
        name = printable(node.name if node and node.name and node.kind != "call" else "")
        parts = [name, class_change(self.diff, row), numbers(row)]
        below = self.diff.children.get(index, ())
        if whole and (own := parameters_below(self.diff, index)):
            parts.append(f"({own:,} parameters)")
        if whole and not self.unfold and below and self._uniform(index):
            parts.append(f"... {self.sizes[index] - 1:,} below")
        yield f"{mark(row)} {self._indent(depth)}{'  '.join(p for p in parts if p)}"
        reason = [f"not traced: {printable(node.reason)}"] if node is not None and node.reason else []
        yield from (f"  {self._indent(depth)}    {line}" for line in [*reason, *self.differences[index]])
        if not whole or self.unfold or not self._uniform(index):
            yield from self._siblings(below, depth + 1)

    def _uniform(self, index: int) -> bool:
        """Whether all below a row had the row's own fate."""
        change = self.diff.rows[index].changes
        below = self.diff.children.get(index, ())
        return all(self.diff.rows[i].changes == change and self._uniform(i) for i in below)

    def _indent(self, depth: int) -> str:
        return " " * min(depth * _STEP, _DEEPEST)
