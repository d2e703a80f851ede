"""Run a network in steps: stop before each norm of interest, look at its input, go on.

A :class:`Program` is a traced network; a :class:`Walk` is one batch on its way through it. Between two stops a walk
holds only the values that are still needed, and :class:`Walks` puts those on disk that exceed a budget of memory. Norms
inside a module that torch.fx cannot follow (a leaf, or the whole network) are reached by running that module again from
its start, once for each visit, up to the norm.
"""

from __future__ import annotations

import inspect
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map_only

from ilmconvert.graph.inputs import Inputs, same_noise, tensors_in
from ilmconvert.graph.shadow import shadow
from ilmconvert.graph.tracer import TraceError, trace

__all__ = ["Program", "Visit", "Walk", "Walks"]


@dataclass(frozen=True)
class Visit:
    """A norm that is about to run.

    Attributes:
        path: of its module.
        input: what it is called with.
    """

    path: str
    input: Tensor


class _Stop(Exception):  # noqa: N818  (a signal, not an error)
    def __init__(self, visit: Visit) -> None:
        super().__init__(visit.path)
        self.visit = visit


class _Whole(nn.Module):
    """A network as a single call."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self.model(*args, **kwargs)


class Program:
    """A network in evaluation mode, and the norms to stop at.

    Args:
        model: the network; it is run as it is, so set its mode before.
        sites: paths of the norms to stop at.
        inputs: an example; where the traced network does not give what the network gives, it is run as a whole.
    """

    def __init__(self, model: nn.Module, sites: Iterable[str], inputs: Inputs) -> None:
        self.model = model
        self.sites = {path: model.get_submodule(path) for path in sites}
        root, graph, self.prefix = model, self._traced(inputs), ""
        if graph is None:
            root = nn.Module()
            root.whole = _Whole(model)
            graph, self.prefix = _whole_graph(), "whole.model."
        self.nodes = list(graph.nodes)
        self.interpreter = fx.Interpreter(root, garbage_collect_values=False, graph=graph)
        self.seeds = {node: i for i, node in enumerate(self.nodes)}
        self.dying = _last_uses(self.nodes)
        self.inside = {node: self._sites_in(node) for node in self.nodes}

    def _traced(self, inputs: Inputs) -> fx.Graph | None:
        try:
            graph = trace(shadow(self.model))
            with torch.no_grad():
                same = _equal(
                    inputs(self.model),
                    fx.Interpreter(self.model, graph=graph).run(*self._bound(graph.nodes, inputs.copied())),
                )
        except (TraceError, TypeError, RuntimeError, ValueError, AssertionError, AttributeError):
            return None  # the network itself is run instead
        return graph if same else None

    def _bound(self, nodes: Iterable[fx.Node], inputs: Inputs) -> list[Any]:
        """A value for each placeholder; the graph itself objects to values that its trace did not foresee."""
        call = inspect.signature(self.model.forward).bind(*inputs.args, **inputs.kwargs)
        call.apply_defaults()
        values, placeholders = list(call.arguments.values()), [n for n in nodes if n.op == "placeholder"]
        if len(values) != len(placeholders):
            raise TypeError(f"traced with {len(placeholders)} arguments, called with {len(values)}")
        return values

    def _sites_in(self, node: fx.Node) -> tuple[str, ...]:
        """The sites that running a node may visit."""
        if node.op != "call_module":
            return ()
        path = str(node.target)
        return tuple(s for s in self.sites if f"{self.prefix}{s}" == path or f"{self.prefix}{s}".startswith(f"{path}."))

    def start(self, inputs: Inputs) -> dict[str, Any]:
        """The values that a walk begins with, by node name."""
        placeholders = [node.name for node in self.nodes if node.op == "placeholder"]
        given = inputs.copied()
        values = [given.args, dict(given.kwargs)] if self.prefix else self._bound(self.nodes, given)
        return dict(zip(placeholders, values, strict=True))

    def run(self, node: fx.Node, values: dict[str, Any]) -> Any:
        """The value of one node; what it draws of random numbers is the same in every network."""
        given = {n: values[n.name] for n in node.all_input_nodes}
        if self.inside[node] and f"{self.prefix}{self.inside[node][0]}" != node.target:  # it runs again on these
            given = tree_map_only(Tensor, torch.clone, given)
        self.interpreter.env = given
        with same_noise(self.seeds[node]):
            return self.interpreter.run_node(node)

    def run_to(self, node: fx.Node, values: dict[str, Any], visit: int) -> Any:
        """As :meth:`run`, but raise ``_Stop`` before the given visit to a site."""
        count = 0

        def hook(path: str) -> Callable[..., None]:
            def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                nonlocal count
                if count == visit:
                    raise _Stop(Visit(path, args[0] if args else next(iter(kwargs.values()))))
                count += 1

            return stop

        handles = [self.sites[p].register_forward_pre_hook(hook(p), with_kwargs=True) for p in self.inside[node]]
        try:
            return self.run(node, values)
        finally:
            for handle in handles:
                handle.remove()


def _whole_graph() -> fx.Graph:
    graph = fx.Graph()
    graph.output(graph.call_module("whole", (graph.placeholder("args"), graph.placeholder("kwargs"))))
    return graph


def _last_uses(nodes: Sequence[fx.Node]) -> dict[fx.Node, list[str]]:
    """By node, the values that nothing after it needs."""
    last: dict[str, fx.Node] = {}
    for node in nodes:
        last.update(dict.fromkeys((n.name for n in (node, *node.all_input_nodes)), node))
    dying: dict[fx.Node, list[str]] = {node: [] for node in nodes}
    for name, node in last.items():
        dying[node].append(name)
    return dying


def _equal(a: Any, b: Any) -> bool:
    xs, ys = tensors_in(a), tensors_in(b)
    return len(xs) == len(ys) and all(
        x.shape == y.shape and torch.allclose(x, y, 1e-4, 1e-5, equal_nan=True) for x, y in zip(xs, ys, strict=True)
    )


class Walk:
    """One batch on its way through a program.

    Attributes:
        output: what the network returned, once :meth:`advance` has returned None.
    """

    def __init__(self, program: Program, inputs: Inputs) -> None:
        self._program = program
        self._values = program.start(inputs)
        self._position, self._visits = 0, 0
        self._file: Path | None = None
        self.output: Any = None

    @torch.no_grad()
    def advance(self) -> Visit | None:
        """Go on to the next visit of a site, or to the end."""
        self._restore()
        program = self._program
        while self._position < len(program.nodes):
            node = program.nodes[self._position]
            try:
                self._run(node)
            except _Stop as stop:
                self._visits += 1
                return stop.visit
            self._position, self._visits = self._position + 1, 0
        return None

    def _run(self, node: fx.Node) -> None:
        if node.op == "output":
            self.output = self._program.run(node, self._values)
        elif node.op != "placeholder":
            self._values[node.name] = self._program.run_to(node, self._values, self._visits)
        for name in self._program.dying[node]:
            self._values.pop(name, None)

    def nbytes(self) -> int:
        """Bytes of memory that the walk holds."""
        storages = [t.untyped_storage() for t in tensors_in(self._values)]
        return sum({s.data_ptr(): s.nbytes() for s in storages}.values())

    def spill(self, file: Path) -> None:
        """Put the values on disk; they are read back when the walk goes on."""
        sharing = Counter(t.untyped_storage().data_ptr() for t in tensors_in(self._values))

        def alone(tensor: Tensor) -> Tensor:
            """A view drags its base; but what is written through one of several must reach the others."""
            return tensor.clone() if sharing[tensor.untyped_storage().data_ptr()] == 1 else tensor

        torch.save(tree_map_only(Tensor, alone, self._values), file)
        self._file, self._values = file, {}

    def _restore(self) -> None:
        if self._file is not None:
            self._values = torch.load(self._file, weights_only=False)  # written by this process a moment ago
            self._file.unlink()
            self._file = None


class Walks:
    """All batches on their way through some networks, within a budget of memory; closing it empties the disk.

    Args:
        programs: the networks.
        batches: the inputs of each.
        budget: bytes that waiting walks may hold in memory; the others wait on disk.

    Attributes:
        spilled: how often a batch was put on disk.
    """

    def __init__(self, programs: Sequence[Program], batches: Iterable[Inputs], budget: int) -> None:
        self._budget, self._held = budget, 0
        self.spilled = 0
        self._folder = tempfile.TemporaryDirectory(prefix="ilmconvert-")
        self._walks: list[tuple[Walk, ...]] = []
        self._sizes: list[int] = []
        for index, inputs in enumerate(batches):
            self._walks.append(tuple(Walk(program, inputs) for program in programs))
            self._sizes.append(0)
            self._settle(index)

    def advance(self) -> Iterator[tuple[Visit | None, ...]]:
        """Bring every batch to its next stop; yields the visits of the networks, batch by batch."""
        for i, walks in enumerate(self._walks):
            self._held -= self._sizes[i]
            yield tuple(walk.advance() for walk in walks)
            self._settle(i)

    def __enter__(self) -> Walks:
        return self

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()

    def _settle(self, index: int) -> None:
        walks = self._walks[index]
        size = sum(walk.nbytes() for walk in walks)
        if self._held + size > self._budget:
            for j, walk in enumerate(walks):
                walk.spill(Path(self._folder.name) / f"{index}-{j}.pt")
            size, self.spilled = 0, self.spilled + 1
        self._sizes[index] = size
        self._held += size
