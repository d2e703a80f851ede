"""What runs in a model: modules and function calls in execution order, traced whole or piece by piece."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn

from ilmconvert.comparison.describe import constant, role_of
from ilmconvert.graph.explore import owner_path
from ilmconvert.graph.tracer import NormTracer, TraceError, trace

__all__ = ["Call", "Calls", "read_calls", "taken_whole"]

Sources = tuple[str, ...]

# reading a shape and reckoning with it is bookkeeping, not part of the network
_READS = frozenset({"shape", "ndim", "dtype", "device", "size", "dim", "is_cuda", "requires_grad", "numel"})
_ARITHMETIC = frozenset(
    {"add", "sub", "mul", "floordiv", "truediv", "mod", "neg", "pow", "round", "floor", "ceil", "sqrt"}
)
_COMPARISONS = frozenset({"eq", "ne", "lt", "le", "gt", "ge", "and", "or", "not"})
_RECKONS = _ARITHMETIC | _COMPARISONS | {"getitem", "getattr", "int", "float", "max", "min", "len"}


@dataclass
class Call:
    """One module or function that runs.

    Attributes:
        path: as :class:`ilmconvert.comparison.nodes.Node` has it.
        owner: path of the module whose forward makes the call.
        cls: the function's name; empty for modules.
        arguments: a function's constant arguments.
        inputs: paths of the calls whose results it takes.
        count: how often it is called.
    """

    path: str
    owner: str
    cls: str = ""
    arguments: str = ""
    inputs: list[str] = field(default_factory=list)
    count: int = 0


@dataclass
class Calls:
    """Everything that runs.

    Attributes:
        found: by path, in execution order.
        untraced: what torch.fx could not follow, with the reason.
        graphs: the graph of each piece that it could, by the module's path.
        names: paths of the function calls in these graphs.
    """

    found: dict[str, Call] = field(default_factory=dict)
    untraced: dict[str, str] = field(default_factory=dict)
    graphs: dict[str, fx.Graph] = field(default_factory=dict)
    names: dict[fx.Node, str] = field(default_factory=dict)


def read_calls(model: nn.Module, paths: dict[nn.Module, str]) -> Calls:
    """Trace ``model`` (a shadow; it may be changed by its own forward code).

    Args:
        model: the root, in the mode to look at.
        paths: the canonical path of every module.
    """
    reader = _Reader(paths)
    reader.module(model, (), None)
    return reader.calls


def taken_whole(module: nn.Module) -> bool:
    """Whether a module is one node: norms, ILM layers, and torch.nn's own modules unless a norm is in them."""
    if role_of(module):
        return True
    if not _has_forward(module):  # ModuleList and the like only hold others
        return False
    if not NormTracer().is_leaf_module(module, "") or not type(module).__module__.startswith("torch."):
        return False
    return not any(role_of(m) for m in module.modules() if m is not module)


def _has_forward(module: nn.Module) -> bool:
    return type(module).forward is not nn.Module.forward


class _Reader:
    def __init__(self, paths: dict[nn.Module, str]) -> None:
        self.paths, self.calls = paths, Calls()
        self.ordinals: dict[tuple[str, str], int] = {}

    def _piece(self, module: nn.Module, inputs: Sequence[Sources], names: list[str] | None) -> Sources:
        path = self.paths[module]
        if path in self.calls.untraced:  # called again
            return self._again(path, inputs)
        try:
            graph = trace(module) if _has_forward(module) else None
        except TraceError as error:
            self.calls.untraced[path], graph = str(error), None
        if graph is None:
            return self._children(path, module, inputs)
        self.calls.graphs[path] = graph
        everything = _unique(inputs)
        given = dict(zip(names, inputs, strict=True)) if names is not None else {}
        return self._nodes(path, module, graph, given, everything)

    def _again(self, path: str, inputs: Sequence[Sources]) -> Sources:
        call = self.calls.found.setdefault(path, Call(path, path))
        call.count += 1
        call.inputs = list(dict.fromkeys([*call.inputs, *_unique(inputs)]))
        return (path,)

    def _children(self, path: str, module: nn.Module, inputs: Sequence[Sources]) -> Sources:
        """An untraced module is one node; the modules in it are traced as if it called each of them once."""
        result = self._again(path, inputs) if path in self.calls.untraced else _unique(inputs)
        for child in module.children():
            if self.paths[child] not in self.calls.found and self.paths[child] not in self.calls.graphs:
                self.module(child, [result], None)
        return result

    def module(self, module: nn.Module, inputs: Sequence[Sources], names: list[str] | None) -> Sources:
        """Follow one call of ``module``; returns the paths of what its result comes from.

        Args:
            module: what is called.
            inputs: what each argument comes from.
            names: the parameter that each argument is given to; None gives everything to all.
        """
        if not taken_whole(module):
            return self._piece(module, inputs, names)
        path = self.paths[module]
        return self._again(path, inputs)

    def _nodes(
        self, path: str, root: nn.Module, graph: fx.Graph, given: dict[str, Sources], everything: Sources
    ) -> Sources:
        sources: dict[fx.Node, Sources] = {}
        numbers: set[fx.Node] = set()
        result: Sources = ()
        for node in graph.nodes:
            inputs = [sources[n] for n in node.all_input_nodes]
            if node.op == "placeholder":
                sources[node] = given.get(str(node.target).lstrip("*"), everything if not given else ())
            elif node.op == "call_module":
                module = root.get_submodule(str(node.target))
                sources[node] = self.module(module, inputs, _parameters(module, node))
            elif node.op in ("call_function", "call_method"):
                plain = _is_bookkeeping(node, numbers)
                numbers |= {node} if plain else set()
                sources[node] = () if plain else self._function(path, node, inputs)
            elif node.op == "output":
                result = _unique(inputs)
            else:
                sources[node] = ()
        return result

    def _function(self, path: str, node: fx.Node, inputs: list[Sources]) -> Sources:
        name = _function_name(node)
        owner = owner_path(path, node)
        ordinal = self.ordinals[owner, name] = self.ordinals.get((owner, name), 0) + 1
        full = f"{owner}:{name}" + (f"#{ordinal}" if ordinal > 1 else "")
        self.calls.names[node] = full
        self.calls.found[full] = Call(full, owner, name, _arguments(node), list(_unique(inputs)), 1)
        return (full,)


def _unique(inputs: Sequence[Sources]) -> Sources:
    return tuple(dict.fromkeys(path for source in inputs for path in source))


def _parameters(module: nn.Module, node: fx.Node) -> list[str] | None:
    """The parameter of ``module.forward`` that each input node is given to; None if that is not one to one."""
    try:
        bound = inspect.signature(module.forward).bind(*node.args, **node.kwargs).arguments
    except TypeError:
        return None
    by_input = {value: name for name, value in bound.items() if isinstance(value, fx.Node)}
    names = [by_input.get(n) for n in node.all_input_nodes]
    return None if None in names else [n for n in names if n is not None]


def _function_name(node: fx.Node) -> str:
    target: str | Callable[..., Any] = node.target
    if isinstance(target, str):
        return target
    name = getattr(target, "__name__", None) or str(target)
    return re.sub(r"\s+", " ", name).strip("_") or name


def _is_bookkeeping(node: fx.Node, numbers: set[fx.Node]) -> bool:
    """Whether a call checks something, or computes a number from shapes; ``numbers`` holds those before it."""
    name = _function_name(node)
    if "assert" in name or name in _READS or (name == "getattr" and node.args[1] in _READS):
        return True
    if name in _COMPARISONS and all("assert" in _function_name(user) for user in node.users):
        return True
    return name in _RECKONS and bool(node.all_input_nodes) and numbers.issuperset(node.all_input_nodes)


def _arguments(node: fx.Node) -> str:
    """The call's arguments, with ``*`` for what is computed."""
    parts = [_argument(a) for a in node.args]
    parts += [f"{k}={_argument(v)}" for k, v in node.kwargs.items()]
    return ", ".join(parts)


def _argument(value: Any) -> str:
    if isinstance(value, fx.Node):
        return "*"
    if isinstance(value, (tuple, list)):
        return f"({', '.join(_argument(v) for v in value)})"
    if isinstance(value, slice):
        return ":".join("" if v is None else _argument(v) for v in (value.start, value.stop, value.step))
    return constant(value) or type(value).__name__
