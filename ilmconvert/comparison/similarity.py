"""How alike two nodes are: signatures of nodes and subtrees, and a score from 0 to 1."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable

from ilmconvert.comparison.nodes import ModelGraph, Node

__all__ = ["ENOUGH", "Profile", "similarity"]

ENOUGH = 0.3  # pairs below this are rather one removed and one inserted
_NAME = 0.1


class Profile:
    """What comparing needs of one model, computed once.

    Attributes:
        graph: the model.
        own: signature of each node without its name and its place.
        subtree: signature of each node with everything below, names below included.
        leaves: what is below each node, counted twice: by class alone and by signature.
        weights: paths of the nodes that have parameters or buffers in them or below.
    """

    def __init__(self, graph: ModelGraph) -> None:
        self.graph = graph
        self.own: dict[str, int] = {}
        self.subtree: dict[str, int] = {}
        self.leaves: dict[str, Counter[Hashable]] = {}
        self.weights: set[str] = set()
        for node in reversed(graph.nodes):  # children before parents
            self._add(node)

    def _add(self, node: Node) -> None:
        children = self.graph.children.get(node.path, ())
        own = self.own[node.path] = hash(_signature(node))
        parts = tuple(("" if c.kind == "call" else c.name, self.subtree[c.path]) for c in children)
        self.subtree[node.path] = hash((own, parts))
        below: Counter[Hashable] = Counter()
        for child in children:
            below.update(self.leaves[child.path])
        if not children:
            below.update((node.cls, own))
        self.leaves[node.path] = below
        if node.tensors or any(c.path in self.weights for c in children):
            self.weights.add(node.path)


def _signature(node: Node) -> tuple[Hashable, ...]:
    tensors = tuple((t.name, t.kind, t.shape, t.dtype, t.saved, bool(t.tied)) for t in node.tensors)
    attributes = tuple(sorted(node.attributes.items()))
    return node.kind, node.cls, attributes, tensors, node.calls, len(node.aliases)


def similarity(a: Node, b: Node, before: Profile, after: Profile) -> float:
    """How alike two nodes are: 1 and more for the same, 0 for nothing in common."""
    if (a.kind == "call") != (b.kind == "call"):
        return 0.0
    if a.kind == "call":
        return 0.0 if a.cls != b.cls else 1.0 if a.attributes == b.attributes else 0.7
    name = _NAME if a.name == b.name else 0.0
    if before.subtree[a.path] == after.subtree[b.path]:
        return 1.0 + name
    if (a.kind == "module") != (b.kind == "module"):
        return ENOUGH if name else 0.0
    return name + (_leaves(a, b, bool(name)) if a.kind == "module" else _blocks(a, b, bool(name), before, after))


def _leaves(a: Node, b: Node, same_name: bool) -> float:
    same_tensors = [t.shape for t in a.tensors] == [t.shape for t in b.tensors]
    unnamed = a.name.isdecimal() and b.name.isdecimal()
    if a.cls == b.cls:  # other shapes under another name are another layer
        return 0.6 if same_tensors or same_name or unnamed else 0.2
    if a.role and b.role:
        return 0.5
    return 0.4 if same_tensors and a.tensors else 0.25 if same_name else 0.0


def _blocks(a: Node, b: Node, same_name: bool, before: Profile, after: Profile) -> float:
    x, y = before.leaves[a.path], after.leaves[b.path]
    shared = (x & y).total() / max((x | y).total(), 1)
    same_class = 0.1 if a.cls == b.cls else 0.0
    least = ENOUGH - _NAME if same_name and same_class else 0.0
    return max(0.8 * shared + same_class, least)
