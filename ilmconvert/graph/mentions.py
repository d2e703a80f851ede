"""Which norm functions a module's code mentions, read from its bytecode.

Neither torch.fx nor a run on fake tensors gets past a branch on values. What stands behind it is not known to run, but
it must not be passed over either.
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

__all__ = ["mentioned_norms"]

_DEPTH = 3  # helpers called by helpers


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
