"""A diff as a drawing by graphviz: the whole graph, or one block; what is equal is folded into one node."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from ilmconvert.comparison.nodes import Node
from ilmconvert.comparison.render.words import class_change, cut, printable, subtrees
from ilmconvert.comparison.value import GraphDiff, Row
from ilmconvert.errors import IlmconvertError, UsageError

__all__ = ["image", "source"]

_COLOURS = {  # fill and border
    "": ("#ffffff", "#8b8d98"),
    "changed": ("#fff6d9", "#9a6700"),
    "inserted": ("#e3f6e6", "#1a7f37"),
    "removed": ("#fdeceb", "#b42318"),
    "moved": ("#e5f1fd", "#0b63b5"),
    "renamed": ("#f1ebfc", "#6e4bb8"),
}
_LONGEST = 60


def image(diff: GraphDiff, form: Literal["svg", "png"], *, block: str | None = None) -> bytes:
    """The drawing in a file format.

    Raises:
        UsageError: there is no such block.
        IlmconvertError: graphviz is not installed: its Python package, or its program ``dot``.
    """
    graph = source(diff, block=block)
    try:
        return bytes(graph.pipe(format=form, engine="dot"))
    except _graphviz().ExecutableNotFound as error:
        raise IlmconvertError(
            "drawing needs graphviz's program 'dot', which is not on the PATH; install it (apt-get install graphviz, "
            "brew install graphviz), or use another --format"
        ) from error


def source(diff: GraphDiff, *, block: str | None = None) -> Any:
    """The drawing as a ``graphviz.Digraph``."""
    tops = diff.children.get(None, ()) if block is None else (_find(diff, block),)
    return _Drawing(diff).draw(tops)


def _graphviz() -> Any:
    try:
        import graphviz
    except ImportError as error:
        raise IlmconvertError(
            "drawing needs the package graphviz: pip install 'ilmconvert[diagram]' (and graphviz's program 'dot')"
        ) from error
    return graphviz


def _find(diff: GraphDiff, path: str) -> int:
    for index, row in enumerate(diff.rows):
        if path in (row.after, row.before) and diff.children.get(index):
            return index
    blocks = [row.path for i, row in enumerate(diff.rows) if row.path and diff.children.get(i)]
    raise UsageError(f"expected the path of a block, got {path!r}; blocks are {', '.join(blocks[:5])}, ...")


class _Drawing:
    def __init__(self, diff: GraphDiff) -> None:
        self.diff, self.graphviz = diff, _graphviz()
        self.changed, self.sizes = subtrees(diff)
        self.shown: dict[int, int] = {}  # row to the row that is drawn for it

    def draw(self, tops: tuple[int, ...]) -> Any:
        graph = self.graphviz.Digraph(
            graph_attr={"rankdir": "TB", "fontname": "Helvetica", "fontsize": "11", "nodesep": "0.2", "ranksep": "0.3"},
            node_attr={"shape": "box", "style": "rounded,filled", "fontname": "Helvetica", "fontsize": "10"},
            edge_attr={"color": "#60646c", "arrowsize": "0.6"},
        )
        for top in tops:
            self._add(graph, top, top=True)
        for (a, b), sides in self._edges().items():
            only = {"before": ("removed", "dashed"), "after": ("inserted", "solid")}.get("".join(sides), ("", "solid"))
            graph.edge(f"n{a}", f"n{b}", color=_COLOURS[only[0]][1], style=only[1])
        return graph

    def _add(self, graph: Any, index: int, *, top: bool = False) -> None:
        row = self.diff.rows[index]
        below = self.diff.children.get(index, ())
        if below and (top or self.changed[index]):
            self.shown[index] = index
            fill, border = _COLOURS[row.changes[0] if row.changes else ""]
            with graph.subgraph(name=f"cluster_{index}") as cluster:
                cluster.attr(label=self._label(row), color=border, bgcolor=fill if row.changes else "transparent")
                for child in below:
                    self._add(cluster, child)
            return
        self._node(graph, index)

    def _node(self, graph: Any, index: int) -> None:
        row = self.diff.rows[index]
        fill, border = _COLOURS[row.changes[0] if row.changes else ""]
        norm = any(node is not None and node.role for node in self.diff.nodes(row))
        folded = self.sizes[index] - 1
        more = f"\n{folded} unchanged" if folded else ""
        width = "2.4" if norm else "1"
        graph.node(f"n{index}", self._label(row, more), fillcolor=fill, color=border, penwidth=width)
        for inner in self._all_below(index):
            self.shown[inner] = index

    def _all_below(self, index: int) -> Iterator[int]:
        yield index
        for child in self.diff.children.get(index, ()):
            yield from self._all_below(child)

    def _label(self, row: Row, more: str = "") -> Any:
        a, b = self.diff.nodes(row)
        node = b or a
        name = "" if node is None or node.kind == "call" else node.name
        lines = [cut(text, _LONGEST) for text in (printable(name), class_change(self.diff, row)) if text]
        return self.graphviz.escape("\n".join(lines) + more)  # a str that is never taken as HTML

    def _edges(self) -> dict[tuple[int, int], list[str]]:
        """Edges between what is drawn, with the sides that have them."""
        edges: dict[tuple[int, int], list[str]] = {}
        for side in ("before", "after"):
            paths = {getattr(row, side): i for i, row in enumerate(self.diff.rows)}
            for path, index in paths.items():
                for source in self._node_of(path, side).inputs if path is not None and index in self.shown else ():
                    ends = self.shown.get(paths.get(source, -1)), self.shown[index]
                    if ends[0] is not None and ends[0] != ends[1]:
                        sides = edges.setdefault((ends[0], ends[1]), [])
                        if side not in sides:
                            sides.append(side)
        return edges

    def _node_of(self, path: str, side: str) -> Node:
        return (self.diff.before if side == "before" else self.diff.after).by_path[path]
