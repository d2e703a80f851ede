"""A diff as a tree in plain text: one line for each changed node, its differences below, what is equal folded."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

from ilmconvert.comparison.render.words import (
    class_change,
    counts_line,
    details,
    frequent,
    mark,
    numbers,
    parameters_below,
    printable,
    totals,
)
from ilmconvert.comparison.value import GraphDiff

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
    lines = [*_head(diff), *notes, "", *_Tree(diff, unfold, width).lines()]
    return "".join(f"{_cut(line, width)}\n" for line in lines)


def summary(diff: GraphDiff, *, width: int = 80) -> str:
    """At most ten lines."""
    lines = _head(diff)
    often = [f"  {n:,} x {what}" for what, n in frequent(diff)]
    added, removed, renamed = (
        sum(len(getattr(row, name)) for row in diff.rows) for name in ("keys_added", "keys_removed", "keys_renamed")
    )
    last = f"  state dict: {added:,} keys added, {removed:,} removed, {renamed:,} renamed"
    room = _SUMMARY_LINES - len(lines) - 1
    if len(often) > room:
        rest = sum(n for _, n in frequent(diff)[room - 1 :])
        often = [*often[: room - 1], f"  {rest:,} others"]
    return "".join(f"{_cut(line, width)}\n" for line in [*lines, *often, last])


def _head(diff: GraphDiff) -> list[str]:
    same = "the same structure" if diff.equal else counts_line(diff)
    lines = [printable(f"{diff.before.name} -> {diff.after.name}"), f"  {same}"]
    for what, before, after, difference in totals(diff):
        lines.append(f"  {what}: {before}" + (f" -> {after} ({difference})" if before != after else ""))
    errors = dict.fromkeys(graph.run_error for graph in (diff.before, diff.after) if graph.run_error)
    if errors:
        lines.append(f"  could not be run for shapes and counts: {printable('; '.join(errors))}")
    if diff.numerics is not None:
        output = next((text for row in diff.rows if (text := numbers(row))), "not compared")
        more = len(diff.numerics.notes)
        noted = f"; {more} note{'' if more == 1 else 's'}" if more else ""
        lines.append(f"  outputs: {output} (on {printable(diff.numerics.inputs)}{noted})")
    return lines


def _cut(line: str, width: int) -> str:
    return line if len(line) <= width else f"{line[: width - 3]}..."


class _Tree:
    def __init__(self, diff: GraphDiff, unfold: bool, width: int) -> None:
        self.diff, self.unfold, self.width = diff, unfold, width
        self.told: dict[tuple[str, ...], str] = {}
        self.changed, self.sizes = self._below()

    def _below(self) -> tuple[list[bool], list[int]]:
        """Whether anything changed in each row's subtree, and how many rows it has."""
        changed = [bool(row.changes) for row in self.diff.rows]
        sizes = [1] * len(changed)
        for index in reversed(range(len(changed))):
            parent = self.diff.rows[index].parent
            if parent is not None:
                changed[parent] |= changed[index]
                sizes[parent] += sizes[index]
        return changed, sizes

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
        parts = [self._shorten(name), class_change(self.diff, row), numbers(row)]
        below = self.diff.children.get(index, ())
        if whole and (own := parameters_below(self.diff, index)):
            parts.append(f"({own:,} parameters)")
        if whole and not self.unfold and below and self._uniform(index):
            parts.append(f"... {self.sizes[index] - 1:,} below")
        yield f"{mark(row)} {self._indent(depth)}{'  '.join(p for p in parts if p)}"
        if node is not None and node.reason:
            yield from self._wrapped(f"not traced: {printable(node.reason)}", depth)
        yield from self._details(index, depth)
        if not whole or self.unfold or not self._uniform(index):
            yield from self._siblings(below, depth + 1)

    def _uniform(self, index: int) -> bool:
        """Whether all below a row had the row's own fate."""
        change = self.diff.rows[index].changes
        below = self.diff.children.get(index, ())
        return all(self.diff.rows[i].changes == change and self._uniform(i) for i in below)

    def _details(self, index: int, depth: int) -> Iterator[str]:
        row = self.diff.rows[index]
        lines = details(self.diff, row)
        known = self.told.setdefault(tuple(lines), printable(row.path)) if len(lines) > 1 else ""
        if known and known != printable(row.path):
            lines = [f"as {known}"]
        for line in lines:
            yield from self._wrapped(line, depth)

    def _wrapped(self, line: str, depth: int) -> Iterator[str]:
        start = f"  {self._indent(depth)}    "
        yield from textwrap.wrap(
            line, self.width, initial_indent=start, subsequent_indent=f"{start}  ", break_on_hyphens=False
        )

    def _indent(self, depth: int) -> str:
        return " " * min(depth * _STEP, _DEEPEST)

    def _shorten(self, name: str) -> str:
        longest = self.width // 2
        return name if len(name) <= longest else f"{name[: longest - 13]}...{name[-10:]}"
