"""What a module's code mentions, read from its bytecode: norm functions, and attributes of its children.

Neither torch.fx nor a run on fake tensors gets past a branch on values. What stands behind it is not known to run, but
it must not be passed over either. And no graph shows the reading of a number.
"""

from __future__ import annotations

import dis
import inspect
import types
from collections.abc import Iterable, Iterator
from functools import cache, partial
from typing import Any

from torch import nn

from ilmconvert.graph.tracer import FUNCTIONAL_NORMS

__all__ = ["mentioned_norms", "read_attributes"]

_DEPTH = 3  # helpers called by helpers
_HARMLESS = ("dtype", "device", "shape")


def mentioned_norms(module: nn.Module) -> frozenset[str]:
    """The full names of the norm functions that a module keeps, its methods name, or the functions that these name.

    torch's own modules are not looked into.

    Example:
        >>> class Own(nn.Module):
        ...     def forward(self, x):
        ...         return nn.functional.layer_norm(x, x.shape[-1:]) if x.sum() > 0 else x
        >>> sorted(mentioned_norms(Own()))
        ['torch.nn.functional.layer_norm']
    """
    kept = (value.func if isinstance(value, partial) else value for value in vars(module).values())
    cls: Any = type(module)  # Any: mypy does not take a class of modules for hashable
    return _of_class(cls) | _of_values(kept, _DEPTH)


@cache
def _of_class(cls: type) -> frozenset[str]:
    own = (base for base in cls.__mro__ if not base.__module__.startswith(("torch.", "builtins")))
    methods = (value for base in own for name, value in vars(base).items() if not name.startswith("__"))
    return _of_values((inspect.unwrap(m) for m in methods if isinstance(m, types.FunctionType)), _DEPTH)


def _of_values(values: Iterable[Any], depth: int) -> frozenset[str]:
    """The norm functions among ``values``, and those in the code of the functions among them."""
    functions = {v for v in values if isinstance(v, (types.FunctionType, types.BuiltinFunctionType))}
    found = {FUNCTIONAL_NORMS[f] for f in functions if f in FUNCTIONAL_NORMS}
    inside = (f for f in functions if isinstance(f, types.FunctionType) and not str(f.__module__).startswith("torch."))
    return frozenset(found.union(*(_of_function(f, depth) for f in inside)))


@cache
def _of_function(function: types.FunctionType, depth: int) -> frozenset[str]:
    return _of_values(_values(function.__code__, function.__globals__), depth - 1) if depth else frozenset()


def _values(code: types.CodeType, names: dict[str, Any]) -> Iterator[Any]:
    """What the code's global names, and attributes of modules among them, stand for."""
    value: Any = None
    for step in dis.get_instructions(code):
        if step.opname == "LOAD_GLOBAL":
            value = names.get(step.argval)
        elif step.opname in ("LOAD_ATTR", "LOAD_METHOD") and isinstance(value, types.ModuleType):
            value = getattr(value, step.argval, None)
        else:
            continue
        yield value
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _values(constant, names)


def read_attributes(module: nn.Module) -> frozenset[tuple[str, str]]:
    """What the forward pass, with the methods it uses, reads of the attributes of its attributes: (``bn``, ``eps``).

    A tensor that is only asked for its dtype, device or shape does not count; neither do torch's own modules.

    Example:
        >>> class Own(nn.Module):
        ...     def forward(self, x):
        ...         return x.to(self.proj.weight.dtype) / self.bn.eps
        >>> sorted(read_attributes(Own()))
        [('bn', 'eps')]
    """
    cls: Any = type(module)
    return _reads_of(cls)


@cache
def _reads_of(cls: type) -> frozenset[tuple[str, str]]:
    found: set[tuple[str, str]] = set()
    todo, seen = ["forward"], set()
    while todo:
        method: Any = getattr(cls, name := todo.pop(), None)
        method = method.fget if isinstance(method, property) else method
        method = inspect.unwrap(method) if callable(method) else None
        if name in seen or not isinstance(method, types.FunctionType) or str(method.__module__).startswith("torch."):
            continue
        seen.add(name)
        for chain in _chains(method.__code__):
            todo.append(chain[0])
            if len(chain) > 1 and chain[2:3] not in [[name] for name in _HARMLESS]:
                found.add((chain[0], chain[1]))
    return frozenset(found)


def _chains(code: types.CodeType) -> Iterator[list[str]]:
    """The attributes that a method's code takes of ``self``, and of those: ``[["bn", "weight", "dtype"], ...]``."""
    chain: list[str] | None = None
    for step in dis.get_instructions(code):
        if step.opname in ("LOAD_ATTR", "LOAD_METHOD") and chain is not None:
            chain.append(step.argval)
            continue
        if chain:
            yield chain
        last = step.argval[-1] if isinstance(step.argval, tuple) and step.argval else step.argval
        chain = [] if step.opname.startswith("LOAD_FAST") and last == code.co_varnames[0] else None
    if chain:
        yield chain
