"""A diff as ``diff -u`` prints it: of the two models' outlines, one line for each node, attribute and tensor."""

from __future__ import annotations

from collections.abc import Iterator
from difflib import unified_diff

from ilmconvert.comparison.nodes import ModelGraph
from ilmconvert.comparison.render.words import printable, tensor
from ilmconvert.comparison.value import GraphDiff

__all__ = ["outline", "unified"]


def unified(diff: GraphDiff) -> str:
    """The unified diff; empty if the outlines are equal."""
    a, b = list(outline(diff.before)), list(outline(diff.after))
    names = printable(f"a/{diff.before.name}"), printable(f"b/{diff.after.name}")
    return "".join(f"{line}\n" for line in unified_diff(a, b, *names, lineterm=""))


def outline(graph: ModelGraph) -> Iterator[str]:
    """A model in a stable textual form: every line starts with its path, so that it can be searched for."""
    for node in graph.nodes:
        path = printable(node.path or "(model)")
        if node.kind == "call":
            yield printable(f"{node.parent or '(model)'}: {node.cls}({node.attributes.get('arguments', '')})")
            continue
        yield f"{path}: {printable(node.cls)}" + (f"  # not traced: {printable(node.reason)}" if node.reason else "")
        yield from (printable(f"{path}.{name} = {value}") for name, value in sorted(node.attributes.items()))
        yield from (f"{path}.{tensor(info)}" for info in node.tensors)
        yield from (printable(f"{path} is also {alias}") for alias in node.aliases)
