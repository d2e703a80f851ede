"""What a module's code mentions, from its bytecode: norm functions, attributes of children, classes, blocks.

Neither torch.fx nor a run on fake tensors gets past a branch on values. What stands behind it is not known to run, but
it must not be passed over either. And no graph shows the reading of a number, or the other methods of a module.
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

__all__ = [
    "asked_classes",
    "has_guarded_block",
    "mentioned_norms",
    "methods_with_norms",
    "own_reads",
    "read_attributes",
]

_DEPTH = 3  # helpers called by helpers
_HARMLESS = ("dtype", "device", "shape")
_ASKING = frozenset(("isinstance", "type", "__class__"))
_GUARDING = ("PUSH_EXC_INFO", "SETUP_FINALLY", "SETUP_WITH")  # handling an exception: since Python 3.11, and in 3.10


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
    for step in (step for inner in _codes(code) for step in dis.get_instructions(inner)):
        if step.opname == "LOAD_GLOBAL":
            value = names.get(step.argval)
        elif step.opname in ("LOAD_ATTR", "LOAD_METHOD") and isinstance(value, types.ModuleType):
            value = getattr(value, step.argval, None)
        else:
            continue
        yield value


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    """A function's code, and that of the functions and comprehensions inside."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def read_attributes(module: nn.Module) -> frozenset[tuple[str, str]]:
    """What the forward pass, with the methods it uses, reads of the attributes of its attributes: (``bn``, ``eps``).

    What is read of anything but an attribute, an element of a list say, has ``*`` for that. A tensor that is only asked
    for its dtype, device or shape does not count; neither do torch's own modules.

    Example:
        >>> class Own(nn.Module):
        ...     def forward(self, x):
        ...         return x.to(self.proj.weight.dtype) / self.bn.eps + self.blocks[0].bias
        >>> sorted(read_attributes(Own()))
        [('*', 'bias'), ('*', 'to'), ('bn', 'eps')]
    """
    cls: Any = type(module)
    return _reads_of(cls)


def asked_classes(module: nn.Module) -> frozenset[type[nn.Module]]:
    """The classes of modules that the forward pass, with the methods it uses, names where it asks for a class.

    Example:
        >>> class Own(nn.Module):
        ...     def forward(self, x):
        ...         for layer in self.layers:
        ...             x = x + layer(x) if isinstance(layer, nn.LayerNorm) else layer(x)
        ...         return x
        >>> asked_classes(Own())
        frozenset({<class 'torch.nn.modules.normalization.LayerNorm'>})
    """
    cls: Any = type(module)
    return _asked_by(cls)


@cache
def _asked_by(cls: type) -> frozenset[type[nn.Module]]:
    reached = ((m, {name for code in _codes(m.__code__) for name in code.co_names}) for m in _reached(cls, "forward"))
    named = (value for m, names in reached if _ASKING & names for value in _values(m.__code__, m.__globals__))
    flat = (v for value in named for v in (value if isinstance(value, tuple) else (value,)))
    return frozenset(v for v in flat if isinstance(v, type) and issubclass(v, nn.Module))


def own_reads(module: nn.Module, called: frozenset[str] = frozenset()) -> dict[str, frozenset[str]]:
    """By the other methods of a module, the attributes of its own that they read, with the methods they use.

    Methods that initialize (``reset_*``, ``init*``) do not count, nor do private ones that are not among ``called``.

    Example:
        >>> class Own(nn.Module):
        ...     def penalty(self):
        ...         return self.gamma.square().sum()
        >>> own_reads(Own())
        {'penalty': frozenset({'gamma'})}
    """
    cls: Any = type(module)
    names = (name for name in _methods(cls, called) if not name.startswith(("reset", "init")))
    return {name: frozenset(c[0] for m in _reached(cls, name) for c in _chains(m) if c[0] != "*") for name in names}


def methods_with_norms(module: nn.Module, called: frozenset[str] = frozenset()) -> dict[str, frozenset[str]]:
    """The other methods of a module that name norm functions, themselves or by the methods they use.

    Private ones count if they are among ``called``.

    Example:
        >>> class Own(nn.Module):
        ...     def features(self, x):
        ...         return nn.functional.layer_norm(x, x.shape[-1:])
        ...     def forward(self, x):
        ...         return self.features(x).mean()
        >>> methods_with_norms(Own())
        {'features': frozenset({'torch.nn.functional.layer_norm'})}
    """
    cls: Any = type(module)
    named = {name: _of_values(_reached(cls, name), _DEPTH) for name in _methods(cls, called)}
    return {name: functions for name, functions in named.items() if functions}


def has_guarded_block(module: nn.Module) -> bool:
    """Whether the forward pass, with the methods it uses, has a ``with`` or ``try`` block."""
    cls: Any = type(module)
    codes = (code for method in _reached(cls, "forward") for code in _codes(method.__code__))
    return any(step.opname in _GUARDING for code in codes for step in dis.get_instructions(code))


@cache
def _methods(cls: type, called: frozenset[str]) -> tuple[str, ...]:
    own = (base for base in cls.__mro__ if not base.__module__.startswith(("torch.", "builtins")))
    names = dict.fromkeys(n for base in own for n, v in vars(base).items() if callable(v) or isinstance(v, property))
    return tuple(name for name in names if name != "forward" and (not name.startswith("_") or name in called))


@cache
def _reached(cls: type, start: str) -> tuple[types.FunctionType, ...]:
    """A method and those that it uses, ``forward`` not among the latter; torch's own modules are not looked into."""
    found: list[types.FunctionType] = []
    todo, seen = [start], {"forward"} - {start}
    while todo:
        if (name := todo.pop()) in seen:
            continue
        seen.add(name)
        for method in _definitions(cls, name):
            found.append(method)
            todo += [chain[0] for chain in _chains(method)]
    return tuple(found)


def _definitions(cls: type, name: str) -> Iterator[types.FunctionType]:
    """A method, and what it overrides as far as ``super()`` may lead there."""
    for base in cls.__mro__:
        method: Any = vars(base).get(name)
        method = method.fget if isinstance(method, property) else method
        method = inspect.unwrap(method) if callable(method) else None
        if method is None:
            continue
        if not isinstance(method, types.FunctionType) or str(method.__module__).startswith("torch."):
            return
        yield method
        if "super" not in method.__code__.co_names:
            return


@cache
def _reads_of(cls: type) -> frozenset[tuple[str, str]]:
    chains = (chain for method in _reached(cls, "forward") for chain in _chains(method))
    return frozenset((c[0], c[1]) for c in chains if len(c) > 1 and c[2:3] not in [[name] for name in _HARMLESS])


def _chains(method: types.FunctionType) -> Iterator[list[str]]:
    """The attributes that a method's code takes of ``self``, and of those: ``[["bn", "weight", "dtype"], ...]``.

    Those of anything else, a module of Python aside, come as ``["*", "weight"]``.
    """
    me = method.__code__.co_varnames[:1]
    for code in _codes(method.__code__):
        yield from _chains_of(code, me)


def _chains_of(code: types.CodeType, me: tuple[str, ...]) -> Iterator[list[str]]:
    chain: list[str] | None = None
    for step in dis.get_instructions(code):
        if step.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            chain = ["*"] if chain is None else chain
            chain.append(step.argval)
            continue
        if chain and chain[0] != "":
            yield chain
        last = step.argval[-1] if isinstance(step.argval, tuple) and step.argval else step.argval
        if ("LOAD_FAST" in step.opname or step.opname == "LOAD_DEREF") and last in me:
            chain = []
        else:
            chain = [""] if step.opname in ("LOAD_GLOBAL", "LOAD_NAME") else None
    if chain and chain[0] != "":
        yield chain
