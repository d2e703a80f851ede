"""A module's own forward as a graph, if a graph repeats it in full.

torch.fx writes down the operations and nothing around them: no ``with`` block, no decorator, no change of what the
module holds, no decision but the one it met. A forward in which any of that is to be found is refused here.
"""

from __future__ import annotations

import inspect
import math
import operator
import random
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

from ilmconvert.graph.mentions import has_guarded_block
from ilmconvert.graph.tracer import TraceError, concrete_defaults
from ilmconvert.wording import one_line

__all__ = ["in_place", "owner_graphs"]


class _OwnerTracer(fx.Tracer):
    """Follows one forward and none of its children's; if ``strict``, only where a graph loses nothing of it."""

    def __init__(self, strict: bool) -> None:
        super().__init__(autowrap_modules=(math,), param_shapes_constant=True)
        self._surroundings = _surroundings() if strict else None

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """As torch.fx does, which does not write ``with`` blocks, decorators and checkpoints down."""
        if self._surroundings and _surroundings() != self._surroundings:
            raise TraceError(
                "a part of it runs without gradients, checkpointed or in an autocast of its own, which a trace forgets"
            )
        return super().create_node(*args, **kwargs)

    def create_arg(self, a: Any) -> Any:
        """As torch.fx does, which makes a plain dict of every kind of dict."""
        if isinstance(a, dict) and type(a) is not dict:
            return self.create_node("call_function", type(a), (), {k: self.create_arg(v) for k, v in a.items()})
        return super().create_arg(a)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """As torch.fx does, whose proxies take ``x += y`` for ``x = x + y``."""
        return _Proxy(node, self)


class _Proxy(fx.Proxy):
    """Notes what is done in place."""


def _noted(name: str) -> Callable[[_Proxy, Any], fx.Proxy]:
    return lambda self, other: self.tracer.create_proxy("call_function", in_place, (name, self, other), {})


for _operator in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor"):
    setattr(_Proxy, f"__{_operator}__", _noted(_operator))


def in_place(name: str, value: Any, other: Any) -> Any:
    """``value += other`` for the name ``iadd``; torch.fx would write a statement, which makes numbers change too."""
    return getattr(operator, name)(value, other)


_saved_tensors_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)  # torch 2.6 has none


def _surroundings() -> tuple[Any, ...]:
    """What a context manager or a decorator around an operation changes."""
    devices = ("cpu", "cuda")
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        *((torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in devices),
        _saved_tensors_hooks and _saved_tensors_hooks(True),
    )


def _held(owner: nn.Module) -> list[tuple[str, Any]]:
    """What the modules hold, to see whether a forward pass changes it: values by identity, containers by content."""
    held: list[tuple[str, Any]] = []
    for module in owner.modules():
        for name, value in vars(module).items():
            inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
            held += [(name, id(value)), *((name, (key, id(item))) for key, item in inside)]
    return held + [("a buffer", buffer._version) for buffer in owner.buffers() if not buffer.is_inference()]


def owner_graphs(owner: nn.Module, *, strict: bool = False) -> dict[bool, fx.Graph]:
    """The owner's own forward as a graph in training mode (True) and in evaluation (False); its flag is put back.

    Args:
        owner: a (shadow) module.
        strict: refuse a forward of which a graph would lose something, as is right for a decision; a plan that is
            carried out was decided before.

    Raises:
        TraceError: torch.fx cannot follow it in one of them.
    """
    flag = owner.training
    try:
        with torch.inference_mode(False), torch.enable_grad():
            return {mode: _trace(owner, mode, strict) for mode in (flag, not flag)}
    finally:
        owner.training = flag


def _trace(owner: nn.Module, training: bool, strict: bool) -> fx.Graph:
    owner.training = training
    if "forward" in vars(owner):
        raise TraceError("its forward is set on the instance, which torch.fx does not look at")
    defaults = concrete_defaults(owner)
    if nested := [name for name, value in defaults.items() if isinstance(value, (tuple, list, dict))]:
        raise TraceError(f"its parameter {nested[0]!r} has a container for a default, which torch.fx takes apart")
    names = list(inspect.signature(owner.forward).parameters)
    before = _held(owner)
    if strict and has_guarded_block(owner):
        raise TraceError("it has a with or try block, which a trace forgets")
    drawn, noise = random.getstate(), torch.get_rng_state()
    try:
        graph = _OwnerTracer(strict).trace(owner, concrete_args=defaults)
    except Exception as error:  # forward code may raise anything when it meets a proxy
        raise TraceError(one_line(error) or type(error).__name__) from error
    if strict and (random.getstate() != drawn or not torch.equal(torch.get_rng_state(), noise)):
        raise TraceError("it decides by a random number, which a trace would fix")
    if strict and (changed := {name for name, _ in set(_held(owner)) ^ set(before)}):
        raise TraceError(f"it changes what its module holds ({', '.join(sorted(changed))}), which a trace forgets")
    for node, name in zip((n for n in graph.nodes if n.op == "placeholder"), names, strict=False):
        if not str(node.target).startswith("*"):
            node.target = name  # a parameter with a default gets another name otherwise, and no keyword finds it
    made = [str(n.target) for n in graph.nodes if n.op == "get_attr" and "_tensor_constant" in str(n.target)]
    if made:
        raise TraceError("it makes tensors of its own, which a trace would fix to one device and one mode")
    return graph
