"""A module whose functional norms became layers: its class, with a forward written anew from its graphs.

The module stays what it is: submodules, parameters, methods, hooks, flags. Only its class becomes a subclass made for
it, whose ``forward`` is the code of the traced graphs, one for each mode where they differ; ``training`` stays live.
"""

from __future__ import annotations

import importlib
import inspect
import linecache
import types
from collections.abc import Callable, Mapping
from itertools import count
from typing import Any

from torch import fx, nn

from ilmconvert.graph.calls import norm_nodes
from ilmconvert.graph.forward import owner_graphs
from ilmconvert.graph.shadow import shadow
from ilmconvert.graph.tracer import TraceError

__all__ = ["redirected", "restore_", "traced_forward"]

_SERIAL = count()
_MADE: dict[tuple[type[nn.Module], str, str], tuple[Mapping[str, Any], type[nn.Module]]] = {}


def traced_forward(owner: nn.Module) -> Callable[..., Any]:
    """The forward of ``owner`` in its present mode, written anew from its graph; its first argument is the module.

    Raises:
        TraceError: torch.fx cannot follow the owner, or would lose something of it.
    """
    code = owner_graphs(owner, strict=True)[owner.training].python_code("self")
    return _compile(type(owner), code.src, code.globals)


def redirected(
    owner: nn.Module, children: Mapping[str, str], ranks: Mapping[str, int]
) -> tuple[type[nn.Module], set[str]]:
    """A class for ``owner`` whose forward calls modules in place of functions.

    Args:
        owner: left as it is.
        children: name of the call to the path of the module, below ``owner``, that takes its place.
        ranks: as they were when the calls were found.

    Returns:
        The class, and the paths, below ``owner``, of the tensors that its forward still uses.

    Raises:
        TraceError: torch.fx cannot follow the owner.
    """
    copy = shadow(owner)
    graphs = owner_graphs(copy)
    done = set()
    for pairs in norm_nodes(graphs, copy, ranks).values():
        for node, found in pairs:
            if found.call.name in children:
                _replace(node, children[found.call.name])
                done.add(found.call.name)
    if missing := set(children) - done:
        raise TraceError(f"its forward makes no such call: {', '.join(sorted(missing))}")
    codes = {mode: graph.python_code("self") for mode, graph in graphs.items()}
    names = {name: value for code in codes.values() for name, value in code.globals.items()}
    made = _subclass(type(owner), {mode: code.src for mode, code in codes.items()}, names)
    return made, {str(n.target) for graph in graphs.values() for n in graph.nodes if n.op == "get_attr"}


def _replace(node: fx.Node, child: str) -> None:
    x = node.args[0] if node.args else node.kwargs["input"]
    inputs = node.all_input_nodes
    with node.graph.inserting_before(node):
        call = node.graph.call_module(child, (x,))
    node.replace_all_uses_with(call)
    node.graph.erase_node(node)
    for source in inputs:
        if source.op == "get_attr" and not source.users:
            source.graph.erase_node(source)


def restore_(owner: nn.Module) -> None:
    """Give ``owner`` the class and forward back that :func:`redirected` started from."""
    if (base := vars(type(owner)).get("_ilm_original")) is not None:
        owner.__class__ = base


def _subclass(base: type[nn.Module], sources: dict[bool, str], names: Mapping[str, Any]) -> type[nn.Module]:
    """The class for these forwards: one for modules that are alike, so that what they share is still seen."""
    key = base, sources[True], sources[False]
    known, made = _MADE.get(key, (None, None))
    if made is None or known != names:
        made = _made(base, sources, names)
        _MADE[key] = names, made
    return made


def _made(base: type[nn.Module], sources: dict[bool, str], names: Mapping[str, Any]) -> type[nn.Module]:
    forwards = {mode: _compile(base, source, names) for mode, source in sources.items()}
    body: dict[str, Any] = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "_ilm_original": base,
        "__reduce__": lambda self: (_rebuild, (base, sources, _portable(names)), _state(self)),
    }
    if sources[True] == sources[False]:
        body["forward"] = forwards[False]
    else:
        body |= {
            "_forward_train": forwards[True],
            "_forward_eval": forwards[False],
            "forward": _dispatch(forwards[False]),
        }
    kind: Any = type(base)
    made: type[nn.Module] = kind(base.__name__, (nn.Module,), body)
    made.__bases__ = (base,)  # not from the start: a base may want to know of its subclasses, and this is none of them
    return made


def _dispatch(like: Callable[..., Any]) -> Callable[..., Any]:
    """A forward with the parameters of ``like`` that follows the live training flag."""
    code = like.__code__
    names = list(code.co_varnames[1 : code.co_argcount])
    rest = iter(code.co_varnames[code.co_argcount :])
    for flag, stars in ((inspect.CO_VARARGS, "*"), (inspect.CO_VARKEYWORDS, "**")):
        names += [stars + next(rest)] if code.co_flags & flag else []
    given = ", ".join(names)
    source = (
        f"def forward(self, {given}):\n"
        f"    run = self._forward_train if self.training else self._forward_eval\n"
        f"    return run({given})\n"
    )
    made = _compile(nn.Module, source, {})
    made.__defaults__ = like.__defaults__
    return made


def _compile(base: type, source: str, names: Mapping[str, Any]) -> Callable[..., Any]:
    scope = dict(names)
    file = f"<forward of {base.__name__}, written by ilmconvert, {next(_SERIAL)}>"
    try:
        exec(compile(source, file, "exec"), scope)
    except SyntaxError as error:  # a default that is no literal
        raise TraceError(f"torch.fx cannot write it down: {error.text}") from error
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)  # for tracebacks
    forward: Callable[..., Any] = scope["forward"]
    return forward


def _state(module: nn.Module) -> Any:
    own = getattr(module, "__getstate__", None)
    return vars(module) if own is None else own()


def _portable(names: Mapping[str, Any]) -> dict[str, Any]:
    """Modules by name, since pickle does not take them."""
    return {k: ("module", v.__name__) if isinstance(v, types.ModuleType) else v for k, v in names.items()}


def _rebuild(base: type[nn.Module], sources: dict[bool, str], names: Mapping[str, Any]) -> nn.Module:
    """An empty module of the class, for pickle and copy to fill."""
    resolved = {
        k: importlib.import_module(v[1]) if isinstance(v, tuple) and v[:1] == ("module",) else v
        for k, v in names.items()
    }
    cls = _subclass(base, sources, resolved)
    return cls.__new__(cls)
