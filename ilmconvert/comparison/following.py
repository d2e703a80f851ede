"""Run a model along its traced graphs, so that the results of its function calls can be seen.

A hook sees what a module returns, but no ``add`` or ``flatten``. Here the forward of each piece that torch.fx traced is
replaced, on a copy, by its graph run node by node.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

from torch import fx, nn

from ilmconvert.comparison.calls import Calls, read_calls
from ilmconvert.graph.shadow import shadow

__all__ = ["followed", "traced_calls"]

Take = Callable[[str, Any], None]


def traced_calls(model: nn.Module) -> Calls:
    """The pieces and calls of a model, by the paths that :func:`ilmconvert.comparison.reading.read_model` gives."""
    copy = shadow(model).eval()
    return read_calls(copy, {module: path for path, module in copy.named_modules()})


@contextmanager
def followed(model: nn.Module, calls: Calls, take: Take) -> Iterator[None]:
    """Within the block, a run of ``model`` hands the result of each function call to ``take(path, result)``.

    A piece that takes any number of arguments, is called with others than it was traced for, or whose trace made
    constants of its own, runs as it is and hands over nothing.
    """
    with ExitStack() as stack:
        for path, graph in calls.graphs.items():
            module = model.get_submodule(path)
            if all(_can_run(module, node) for node in graph.nodes):
                forward = _along(module, graph, calls.names, take)
                stack.enter_context(mock.patch.dict(vars(module), forward=forward))
        yield


def _can_run(module: nn.Module, node: fx.Node) -> bool:
    target = str(node.target)
    if node.op == "placeholder":
        return not target.startswith("*")
    parent, _, name = target.rpartition(".")
    return node.op != "get_attr" or hasattr(module.get_submodule(parent), name)


def _along(module: nn.Module, graph: fx.Graph, names: dict[fx.Node, str], take: Take) -> Callable[..., Any]:
    original = module.forward
    interpreter = _Interpreter(module, graph, names, take)
    signature = inspect.signature(original)
    placeholders = sum(node.op == "placeholder" for node in graph.nodes)

    def forward(*args: Any, **kwargs: Any) -> Any:
        call = signature.bind(*args, **kwargs)
        call.apply_defaults()
        values = call.arguments
        defaults = [(values[p.name], p.default) for p in signature.parameters.values() if p.default is not p.empty]
        if len(values) != placeholders or any(given is not default for given, default in defaults):
            return original(*args, **kwargs)
        return interpreter.run(*values.values())

    return forward


class _Interpreter(fx.Interpreter):
    def __init__(self, module: nn.Module, graph: fx.Graph, names: dict[fx.Node, str], take: Take) -> None:
        super().__init__(module, graph=graph)
        self._names, self._take = names, take

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n in self._names:
            self._take(self._names[n], result)
        return result
