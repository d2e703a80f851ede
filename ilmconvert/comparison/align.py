"""Which node of one model is which node of the other.

1. From the roots down, the children of a matched pair are matched: first those of the same name (a qualified target is
   what a state dict goes by), then, between these, by the best in-order alignment of what is alike.
2. What is left on both sides is matched wherever it is in the tree: subtrees that are the same, then nodes of which one
   path ends with the other (a model wrapped into another), then blocks that are mostly the same.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator, Sequence
from difflib import SequenceMatcher

from ilmconvert.comparison.nodes import ModelGraph, Node
from ilmconvert.comparison.similarity import ENOUGH, Profile, similarity

__all__ = ["Alignment", "align"]

_TABLE_LIMIT = 40_000  # pairs that the exact alignment of one gap may compare
_ALIKE = 0.5
_ALIKE_BLOCKS = 0.65


class Alignment:
    """The matches between two models.

    Attributes:
        before, after: the models.
        to_after, to_before: path to path, in both directions.
        moved: paths in ``before`` of the nodes that have another parent or another place among their siblings.
    """

    def __init__(self, before: ModelGraph, after: ModelGraph) -> None:
        self.before, self.after = Profile(before), Profile(after)
        self.to_after: dict[str, str] = {}
        self.to_before: dict[str, str] = {}
        self.moved: set[str] = set()

    def match(self, a: Node, b: Node) -> None:
        """Match a pair and what is below it."""
        self.to_after[a.path], self.to_before[b.path] = b.path, a.path
        left, right = self._children(a, b)
        named = self._by_name(left, right)
        kept = set(_longest_rising([j for _, j in named]))
        steady = [(i, j) for i, j in named if j in kept]
        self.moved.update(left[i].path for i, j in named if j not in kept)
        taken_left, taken_right = {i for i, _ in named}, {j for _, j in named}
        pairs = [(left[i], right[j]) for i, j in named]
        for (i0, j0), (i1, j1) in itertools.pairwise([(-1, -1), *steady, (len(left), len(right))]):
            x = [left[i] for i in range(i0 + 1, i1) if i not in taken_left]
            y = [right[j] for j in range(j0 + 1, j1) if j not in taken_right]
            pairs += self._in_order(x, y)
        for child, other in pairs:
            self.match(child, other)

    def _children(self, a: Node, b: Node) -> tuple[list[Node], list[Node]]:
        left = [n for n in self.before.graph.children.get(a.path, ()) if n.path not in self.to_after]
        right = [n for n in self.after.graph.children.get(b.path, ()) if n.path not in self.to_before]
        return left, right

    def _by_name(self, left: list[Node], right: list[Node]) -> list[tuple[int, int]]:
        """Positions of modules of the same name; numbers, which insertions shift, count if the modules are the same."""
        where = {n.name: j for j, n in enumerate(right) if n.kind != "call"}
        found = []
        for i, node in enumerate(left):
            j = where.get(node.name) if node.kind != "call" else None
            if j is None:
                continue
            same = self.before.subtree[node.path] == self.after.subtree[right[j].path]
            if same or not node.name.isdecimal():
                found.append((i, j))
        return found

    def _in_order(self, left: list[Node], right: list[Node]) -> Iterator[tuple[Node, Node]]:
        if len(left) * len(right) <= _TABLE_LIMIT:
            yield from self._best(left, right)
            return
        a, b = ([p.own[n.path] for n in nodes] for p, nodes in ((self.before, left), (self.after, right)))
        for block in SequenceMatcher(None, a, b, autojunk=False).get_matching_blocks():
            yield from zip(left[block.a : block.a + block.size], right[block.b : block.b + block.size], strict=True)

    def _best(self, left: list[Node], right: list[Node]) -> list[tuple[Node, Node]]:
        """The in-order alignment with the largest sum of similarities."""
        scores = [[similarity(a, b, self.before, self.after) for b in right] for a in left]
        best = [[0.0] * (len(right) + 1) for _ in range(len(left) + 1)]
        for i in reversed(range(len(left))):
            for j in reversed(range(len(right))):
                pair = scores[i][j] + best[i + 1][j + 1] if scores[i][j] >= ENOUGH else 0.0
                best[i][j] = max(pair, best[i + 1][j], best[i][j + 1])
        pairs, i, j = [], 0, 0
        while i < len(left) and j < len(right):
            if scores[i][j] >= ENOUGH and best[i][j] == scores[i][j] + best[i + 1][j + 1]:
                pairs.append((left[i], right[j]))
                i, j = i + 1, j + 1
            elif best[i][j] == best[i + 1][j]:
                i += 1
            else:
                j += 1
        return pairs

    def match_elsewhere(self) -> None:
        """Match what is left, wherever it is."""
        self._same_subtrees()
        self._wrapped()
        self._alike_blocks()

    def _left(self, *, before: bool) -> list[Node]:
        graph, matched = (self.before.graph, self.to_after) if before else (self.after.graph, self.to_before)
        return [n for n in graph.nodes if n.kind != "call" and n.path not in matched]

    def _move(self, a: Node, b: Node) -> None:
        self.moved.add(a.path)
        self.match(a, b)

    def _same_subtrees(self) -> None:
        """Subtrees that are the same, large ones first; only those with tensors, others are alike by chance."""
        sources, places = self._by_subtree(before=True), self._by_subtree(before=False)
        for key, nodes in sources.items():
            for node in nodes:
                candidates = [n for n in places.get(key, ()) if self._free(n, before=False)]
                if not candidates or not self._free(node, before=True):
                    continue
                one_of_many = len(nodes) > 1 or len(places[key]) > 1
                if node.kind == "module" and one_of_many:  # a layer of a common size proves nothing
                    continue
                self._move(node, next((n for n in candidates if n.name == node.name), candidates[0]))

    def _by_subtree(self, *, before: bool) -> dict[int, list[Node]]:
        profile = self.before if before else self.after
        found: dict[int, list[Node]] = defaultdict(list)
        for node in self._left(before=before):
            if node.path in profile.weights:
                found[profile.subtree[node.path]].append(node)
        return found

    def _free(self, node: Node, *, before: bool) -> bool:
        """Whether neither the node nor anything below it is matched."""
        graph, matched = (self.before.graph, self.to_after) if before else (self.after.graph, self.to_before)
        if node.path in matched:
            return False
        return all(self._free(child, before=before) for child in graph.children.get(node.path, ()))

    def _wrapped(self) -> None:
        """Nodes of which one path ends with the other."""
        places: dict[str, list[Node]] = defaultdict(list)
        for node in self._left(before=False):
            places[node.name].append(node)
        for node in self._left(before=True):
            for other in places[node.name] if node.path not in self.to_after else ():
                nested = f".{other.path}".endswith(f".{node.path}") or f".{node.path}".endswith(f".{other.path}")
                enough = _ALIKE if node.kind == "module" else _ALIKE_BLOCKS
                if nested and other.path not in self.to_before and self._score(node, other) >= enough:
                    self._move(node, other)
                    break

    def _alike_blocks(self) -> None:
        left = [n for n in self._left(before=True) if n.kind == "block" and n.path in self.before.weights]
        right = [n for n in self._left(before=False) if n.kind == "block" and n.path in self.after.weights]
        if len(left) * len(right) > _TABLE_LIMIT:
            return
        scored = [(self._score(a, b), -i, -j) for i, a in enumerate(left) for j, b in enumerate(right)]
        for score, i, j in sorted(scored, reverse=True):
            a, b = left[-i], right[-j]
            if score >= _ALIKE_BLOCKS and a.path not in self.to_after and b.path not in self.to_before:
                self._move(a, b)

    def _score(self, a: Node, b: Node) -> float:
        return similarity(a, b, self.before, self.after)


def align(before: ModelGraph, after: ModelGraph) -> Alignment:
    """Match the nodes of two models.

    Args:
        before, after: the models.
    """
    result = Alignment(before, after)
    a, b = _roots(result)
    result.match(a, b)
    result.match_elsewhere()
    return result


def _roots(alignment: Alignment) -> tuple[Node, Node]:
    """The roots to begin with: where one model is wrapped into another, the wrapped one."""
    before, after = alignment.before.graph, alignment.after.graph
    pairs = [(a, after.root) for a in _only_children(before)] + [(before.root, b) for b in _only_children(after)]
    return max(((before.root, after.root), *pairs), key=lambda pair: _alike(alignment, *pair))


def _alike(alignment: Alignment, a: Node, b: Node) -> tuple[bool, bool, int]:
    x, y = (
        {n.name for n in p.graph.children.get(r.path, ())} for p, r in ((alignment.before, a), (alignment.after, b))
    )
    return alignment.before.subtree[a.path] == alignment.after.subtree[b.path], a.cls == b.cls, len(x & y)


def _only_children(graph: ModelGraph) -> Iterator[Node]:
    """The modules below the root as long as there is but one, and it is no leaf."""
    node = graph.root
    while True:
        modules = [n for n in graph.children.get(node.path, ()) if n.kind != "call"]
        if len(modules) != 1 or modules[0].kind == "module":
            return
        node = modules[0]
        yield node


def _longest_rising(values: Sequence[int]) -> list[int]:
    """The longest strictly rising subsequence.

    Example:
        >>> _longest_rising([0, 4, 1, 2, 3])
        [0, 1, 2, 3]
    """
    ends: list[int] = []
    chains: list[list[int]] = []
    for value in values:
        at = bisect_left(ends, value)
        chain = [*(chains[at - 1] if at else []), value]
        ends[at : at + 1], chains[at : at + 1] = [value], [chain]
    return chains[-1] if chains else []
