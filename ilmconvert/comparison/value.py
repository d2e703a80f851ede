"""A diff as a value: two models, and one row for every node of either, in the order of the models."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, Literal

from ilmconvert.comparison.nodes import ModelGraph, Node
from ilmconvert.errors import CheckpointError, PlanError
from ilmconvert.jsonable import from_data

__all__ = ["DIFF_VERSION", "Change", "FieldChange", "GraphDiff", "Numbers", "NumericsRun", "Row"]

DIFF_VERSION = 1

Change = Literal["inserted", "removed", "changed", "renamed", "moved"]


@dataclass(frozen=True)
class FieldChange:
    """One difference between two matched nodes.

    Attributes:
        group: ``class``, ``attribute``, ``parameter``, ``buffer`` or ``graph`` (inputs, number of calls, aliases).
        name: of the attribute, parameter or buffer.
        before, after: as text; None where there is none.
    """

    group: Literal["class", "attribute", "parameter", "buffer", "graph"]
    name: str
    before: str | None
    after: str | None


@dataclass(frozen=True)
class Numbers:
    """How far the outputs of two matched modules are apart, over all calls and samples.

    Attributes:
        relative_error: ``|a - b| / |a|``, Euclidean norms; None if it is not finite or the shapes differ.
        cosine: between the two outputs; None as above, or where one of them is zero.
        note: why a figure is missing; empty otherwise.
    """

    relative_error: float | None
    cosine: float | None
    note: str = ""


@dataclass(frozen=True)
class NumericsRun:
    """What the figures of a diff were measured on.

    Attributes:
        inputs: what the models were given, in words.
        samples: how many.
        notes: what could not be measured, or read.
    """

    inputs: str
    samples: int
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Row:
    """A node of one model, or a matched pair.

    Attributes:
        before, after: path in each model; None where it has no such node.
        parent: index of the row above it in the tree; None for the top.
        changes: what happened to it; empty if it is the same. Inserted and removed stand alone; the others combine.
        fields: the differences, for a changed pair.
        keys_added, keys_removed: names that only one state dict has.
        keys_renamed: names that changed with a path, old to new; also below what was renamed or moved.
        numbers: with numerics, how far the two outputs are apart.
    """

    before: str | None
    after: str | None
    parent: int | None
    changes: tuple[Change, ...] = ()
    fields: tuple[FieldChange, ...] = ()
    keys_added: tuple[str, ...] = ()
    keys_removed: tuple[str, ...] = ()
    keys_renamed: dict[str, str] = field(default_factory=dict)
    numbers: Numbers | None = None

    @property
    def path(self) -> str:
        """Where it is now; of a removed node, where it was."""
        return self.after if self.after is not None else self.before or ""


@dataclass(frozen=True)
class GraphDiff:
    """What changed between two models.

    Attributes:
        before, after: the models.
        rows: parents before children, in the order of the second model, removed nodes where they were.
        numerics: what activations were compared on; None if they were not.
        version: of this format.

    Example:
        >>> import ilmconvert, torch
        >>> a = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.LayerNorm(8))
        >>> diff = ilmconvert.convert(a).diff()
        >>> [(row.path, row.changes) for row in diff.changed]
        [('1', ('changed',))]
        >>> GraphDiff.from_dict(diff.to_dict()) == diff
        True
    """

    before: ModelGraph
    after: ModelGraph
    rows: tuple[Row, ...]
    numerics: NumericsRun | None = None
    version: int = DIFF_VERSION

    @property
    def equal(self) -> bool:
        """Whether the two models have the same structure."""
        return not self.changed

    @cached_property
    def changed(self) -> tuple[Row, ...]:
        """The rows where something changed."""
        return tuple(row for row in self.rows if row.changes)

    @cached_property
    def counts(self) -> dict[str, int]:
        """Rows by change, and ``unchanged``."""
        kinds = ("changed", "inserted", "removed", "renamed", "moved")
        counted = {kind: sum(kind in row.changes for row in self.changed) for kind in kinds}
        return {**counted, "unchanged": len(self.rows) - len(self.changed)}

    @cached_property
    def children(self) -> dict[int | None, tuple[int, ...]]:
        """The rows below a row, by index; None holds the top."""
        below: dict[int | None, list[int]] = {}
        for index, row in enumerate(self.rows):
            below.setdefault(row.parent, []).append(index)
        return {index: tuple(rows) for index, rows in below.items()}

    def nodes(self, row: Row) -> tuple[Node | None, Node | None]:
        """The row's node in each model."""
        a = None if row.before is None else self.before.by_path[row.before]
        b = None if row.after is None else self.after.by_path[row.after]
        return a, b

    def to_dict(self) -> dict[str, Any]:
        """As plain data: the fields of this class, with a ``summary`` in front (see ``docs/diff.md``)."""
        totals = {"before": self.before.totals, "after": self.after.totals}
        summary = {"equal": self.equal, "counts": self.counts, "totals": {k: asdict(v) for k, v in totals.items()}}
        return {
            "version": self.version,
            "summary": summary,
            **{k: v for k, v in asdict(self).items() if k != "version"},
        }

    @classmethod
    def from_dict(cls, data: Any) -> GraphDiff:
        """Read :meth:`to_dict` back, also after a trip through JSON.

        Raises:
            CheckpointError: not a diff, an unknown field or value, or a version this release does not read.
        """
        version = data.get("version") if isinstance(data, dict) else None
        if version != DIFF_VERSION:
            raise CheckpointError(f"expected a diff of version {DIFF_VERSION}, got version {version!r}; make it anew")
        try:
            diff = from_data(cls, {k: v for k, v in data.items() if k != "summary"}, "diff")
            for row in diff.rows:
                diff.nodes(row)
        except PlanError as error:
            raise CheckpointError(str(error)) from error
        except KeyError as error:
            raise CheckpointError(f"expected every path in diff.rows to be a node, got {error}") from error
        return diff

    def to_text(self, *, unfold: bool = False, width: int = 80) -> str:
        """A tree in model order, unchanged parts folded unless ``unfold``; lines longer than ``width`` are wrapped."""
        from ilmconvert.comparison.render.text import text

        return text(self, unfold=unfold, width=width)

    def to_summary(self, *, width: int = 80) -> str:
        """At most ten lines, long ones wrapped: counts, totals, what happened most often."""
        from ilmconvert.comparison.render.text import summary

        return summary(self, width=width)

    def to_unified(self) -> str:
        """A unified diff of the two models' outlines, as ``diff -u`` prints; empty if they are equal."""
        from ilmconvert.comparison.render.unified import unified

        return unified(self)

    def to_markdown(self) -> str:
        """Markdown for a pull request; below 60 kB, so that it fits into a comment."""
        from ilmconvert.comparison.render.markdown import markdown

        return markdown(self)

    def to_html(self) -> str:
        """One self-contained page."""
        from ilmconvert.comparison.render.html import html

        return html(self)

    def to_image(self, form: Literal["svg", "png"] = "svg", *, block: str | None = None) -> bytes:
        """The graph, or one block of it, drawn by graphviz.

        Args:
            form: ``svg`` or ``png``.
            block: path of the module to draw; None draws the whole graph.

        Raises:
            UsageError: there is no such block.
            IlmconvertError: graphviz is not installed: its Python package, or its program ``dot``.
        """
        from ilmconvert.comparison.render.image import image

        return image(self, form, block=block)

    def __str__(self) -> str:
        return self.to_text()
