"""From an alignment to rows: what changed in each matched pair, in one merged tree."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ilmconvert.comparison.align import Alignment
from ilmconvert.comparison.nodes import Node, TensorInfo
from ilmconvert.comparison.value import Change, FieldChange, Row

__all__ = ["merge"]

Pair = tuple[str | None, str | None]


def merge(alignment: Alignment) -> tuple[Row, ...]:
    """The merged tree of two aligned models."""
    return _Merger(alignment).rows()


class _Merger:
    def __init__(self, alignment: Alignment) -> None:
        self.alignment = alignment
        self.before, self.after = alignment.before.graph, alignment.after.graph
        self.below: dict[Pair | None, list[Pair]] = {}
        for node in self.after.nodes:
            self.below.setdefault(self._parent_in_after(node), []).append(self._pair(node, in_after=True))
        for nodes in ((self.before.root,), *self.before.children.values()):
            self._place_removed(nodes)

    def _pair(self, node: Node, *, in_after: bool) -> Pair:
        if in_after:
            return self.alignment.to_before.get(node.path), node.path
        return node.path, self.alignment.to_after.get(node.path)

    def _parent_in_after(self, node: Node) -> Pair | None:
        """The row above a node of the second model; above its root, what was around the first model's counterpart."""
        if node.parent is not None:
            return self._pair(self.after.by_path[node.parent], in_after=True)
        inner = self.alignment.to_before.get(node.path)
        outer = None if inner is None else self.before.by_path[inner].parent
        return None if outer is None else (outer, self.alignment.to_after.get(outer))

    def _place_removed(self, siblings: tuple[Node, ...]) -> None:
        """Removed nodes go after the sibling they came after."""
        previous: Pair | None = None
        for node in siblings:
            pair = self._pair(node, in_after=False)
            if pair[1] is None:
                parent = None if node.parent is None else self._pair(self.before.by_path[node.parent], in_after=False)
                rows = self.below.setdefault(parent, [])
                rows.insert(rows.index(previous) + 1 if previous in rows else 0, pair)
            previous = pair

    def rows(self) -> tuple[Row, ...]:
        result: list[Row] = []
        stack: list[tuple[Pair, int | None]] = [(pair, None) for pair in reversed(self.below[None])]
        while stack:
            pair, parent = stack.pop()
            index = len(result)
            result.append(self._row(pair, parent))
            stack += [(child, index) for child in reversed(self.below.get(pair, []))]
        return tuple(result)

    def _row(self, pair: Pair, parent: int | None) -> Row:
        before, after = pair
        if before is None or after is None:
            node = self.before.by_path[before] if before is not None else self.after.by_path[after or ""]
            keys = node.state_keys()
            if before is None:
                return Row(before, after, parent, ("inserted",), keys_added=keys)
            return Row(before, after, parent, ("removed",), keys_removed=keys)
        a, b = self.before.by_path[before], self.after.by_path[after]
        fields = tuple(self._fields(a, b))
        removed, added, renamed = _keys(a, b)
        return Row(before, after, parent, self._changes(a, b, fields), fields, added, removed, renamed)

    def _changes(self, a: Node, b: Node, fields: tuple[FieldChange, ...]) -> tuple[Change, ...]:
        changes: list[Change] = ["changed"] if fields else []
        if a.kind == "call":  # it has no name of its own
            return tuple(changes)
        if a.path in self.alignment.moved:
            changes.append("moved")
        elif a.name != b.name:
            changes.append("renamed")
        return tuple(changes)

    def _fields(self, a: Node, b: Node) -> Iterator[FieldChange]:
        if a.cls != b.cls:
            same = a.class_name == b.class_name
            yield FieldChange("class", "class", a.cls if same else a.class_name, b.cls if same else b.class_name)
        if a.kind != b.kind:
            yield FieldChange("class", "kind", a.kind, b.kind)
        for name in _ordered(a.attributes, b.attributes):
            x, y = a.attributes.get(name), b.attributes.get(name)
            if x != y:
                yield FieldChange("attribute", name, x, y)
        yield from self._tensors(a, b)
        for name, old, new in (("calls", a.calls, b.calls), ("aliases", len(a.aliases), len(b.aliases))):
            if old != new and (name != "calls" or a.kind == b.kind):
                yield FieldChange("graph", name, str(old), str(new))
        if self._rewired(a, b):
            yield FieldChange("graph", "inputs", ", ".join(a.inputs), ", ".join(b.inputs))

    def _tensors(self, a: Node, b: Node) -> Iterator[FieldChange]:
        x, y = {t.name: t for t in a.tensors}, {t.name: t for t in b.tensors}
        for name in _ordered(x, y):
            old, new = x.get(name), y.get(name)
            if old is None or new is None or not self._same_tensor(old, new):
                kind = (new or old or TensorInfo(name, "parameter", (), "")).kind
                yield FieldChange(kind, name, None if old is None else str(old), None if new is None else str(new))

    def _same_tensor(self, a: TensorInfo, b: TensorInfo) -> bool:
        return (a.kind, a.shape, a.dtype, a.saved, bool(a.tied)) == (b.kind, b.shape, b.dtype, b.saved, bool(b.tied))

    def _rewired(self, a: Node, b: Node) -> bool:
        """Whether the inputs are others, apart from what insertions, removals and moves nearby explain."""
        to_after, to_before, moved = self.alignment.to_after, self.alignment.to_before, self.alignment.moved
        nearby = {a.path, *a.inputs, *(to_before[p] for p in b.inputs if p in to_before)}
        explained = any(p not in to_after or p in moved for p in nearby) or any(p not in to_before for p in b.inputs)
        return not explained and tuple(to_after[p] for p in a.inputs) != b.inputs


def _ordered(a: Mapping[str, object], b: Mapping[str, object]) -> list[str]:
    return list(dict.fromkeys([*a, *b]))


def _keys(a: Node, b: Node) -> tuple[tuple[str, ...], tuple[str, ...], dict[str, str]]:
    """State-dict names of a matched pair: removed, added, and renamed with the path or the alias."""
    x, y = [t.name for t in a.tensors if t.saved], [t.name for t in b.tensors if t.saved]
    paths = list(zip((a.path, *a.aliases), (b.path, *b.aliases), strict=False))
    both = [name for name in x if name in y]
    renamed = {_join(p, n): _join(q, n) for p, q in paths if p != q for n in both}
    old, new = set(a.state_keys()), set(b.state_keys())
    removed = tuple(k for k in a.state_keys() if k not in new and k not in renamed)
    added = tuple(k for k in b.state_keys() if k not in old and k not in renamed.values())
    return removed, added, renamed


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
