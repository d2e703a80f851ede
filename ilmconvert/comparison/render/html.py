"""A diff as one self-contained page: no network, a strict content security policy, all names as text.

The page's parts are the files in ``page/``; the diff goes in as JSON in a script element that is not executed. The
policy lets exactly this style and this script run, by their hashes.
"""

from __future__ import annotations

import base64
import hashlib
import html as escaping
import json
from importlib.resources import files
from string import Template
from typing import Any

from ilmconvert.comparison.nodes import Node
from ilmconvert.comparison.render.words import MARKS, printable, totals
from ilmconvert.comparison.value import GraphDiff, Row

__all__ = ["html", "page_data"]

_SCRIPTS = ("data.js", "view.js", "tree.js", "changes.js", "details.js", "layout.js", "graph.js", "chart.js", "main.js")


def html(diff: GraphDiff) -> str:
    """The page."""
    style = _part("style.css")
    script = '"use strict";\n' + "\n".join(_part(name) for name in _SCRIPTS)
    policy = (
        f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    return Template(_part("page.html")).substitute(
        policy=policy,
        title=escaping.escape(printable(f"{diff.before.name} → {diff.after.name}")),
        style=style,
        script=script,
        data=_embedded(page_data(diff)),
    )


def _part(name: str) -> str:
    return (files("ilmconvert.comparison.render") / "page" / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")


def _embedded(data: Any) -> str:
    """JSON that cannot end the script element it stands in."""
    text = json.dumps(data, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def page_data(diff: GraphDiff) -> dict[str, Any]:
    """What the page shows, small: rows by index, equal nodes once, repeated attributes and tensors in tables."""
    return _Data(diff).data()


class _Data:
    def __init__(self, diff: GraphDiff) -> None:
        self.diff = diff
        self.row_before = {row.before: i for i, row in enumerate(diff.rows) if row.before is not None}
        self.row_after = {row.after: i for i, row in enumerate(diff.rows) if row.after is not None}
        self.attributes: dict[str, int] = {}
        self.tensors: dict[str, int] = {}

    def data(self) -> dict[str, Any]:
        rows = [self._row(row) for row in self.diff.rows]
        run = self.diff.numerics
        return {
            "names": [printable(self.diff.before.name), printable(self.diff.after.name)],
            "marks": MARKS,
            "counts": self.diff.counts,
            "totals": totals(self.diff),
            "errors": [printable(g.run_error) for g in (self.diff.before, self.diff.after)],
            "numerics": None if run is None else [printable(run.inputs), [printable(n) for n in run.notes]],
            "rows": rows,
            "before": [
                [self.row_before[n.path], None if n.parent is None else self.row_before[n.parent]]
                for n in self.diff.before.nodes
            ],
            "attributes": [json.loads(text) for text in self.attributes],
            "tensors": [json.loads(text) for text in self.tensors],
        }

    def _row(self, row: Row) -> dict[str, Any]:
        before, after = self.diff.nodes(row)
        x = None if before is None else self._node(before, self.row_before)
        y = None if after is None else self._node(after, self.row_after)
        numbers = row.numbers
        found = {
            "p": row.parent,
            "k": row.changes,
            "x": None if x == y else x,
            "y": y,
            "f": [
                [f.group, *(None if v is None else printable(v) for v in (f.name, f.before, f.after))]
                for f in row.fields
            ],
            "add": [printable(k) for k in row.keys_added],
            "del": [printable(k) for k in row.keys_removed],
            "ren": [[printable(k), printable(v)] for k, v in row.keys_renamed.items()],
            "num": None if numbers is None else [numbers.relative_error, numbers.cosine, printable(numbers.note)],
        }
        return {k: v for k, v in found.items() if v not in (None, [], (), "")}

    def _node(self, node: Node, rows: dict[str, int]) -> dict[str, Any]:
        attributes = [[printable(k), printable(v)] for k, v in node.attributes.items()]
        tensors = [[t.kind, printable(t.name), printable(str(t))] for t in node.tensors]
        found = {
            "path": printable(node.path),
            "name": printable(node.name if node.kind != "call" else node.class_name),
            "cls": printable(node.class_name),
            "full": printable(node.cls) if node.cls != node.class_name else "",
            "kind": node.kind,
            "role": node.role,
            "why": printable(node.reason),
            "a": _index(self.attributes, attributes),
            "t": _index(self.tensors, tensors),
            "in": [rows[p] for p in node.inputs if p in rows],
            "n": node.calls if node.calls != 1 else None,
            "out": [list(shape) for shape in node.output_shapes],
            "also": [printable(a) for a in node.aliases],
        }
        return {k: v for k, v in found.items() if v not in (None, [], "")}


def _index(table: dict[str, int], value: list[Any]) -> int | None:
    return table.setdefault(json.dumps(value), len(table)) if value else None
