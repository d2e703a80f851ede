"""Run a shadow, without values, and record what reaches each norm: order, counts and shapes, whatever torch.fx says."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from ilmconvert.graph.inputs import Inputs
from ilmconvert.graph.meta import MetaMode
from ilmconvert.graph.tracer import FUNCTIONAL_NORMS
from ilmconvert.nn import ILMNorm
from ilmconvert.quiet import quiet
from ilmconvert.wording import brief

__all__ = ["FunctionalCall", "Run", "Shapes", "record_run"]

Shapes = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class FunctionalCall:
    """A norm that ran as a function: the path of the module that called it, the function, and whether on a weight.

    ``reads`` is the path of the norm module whose parameters it was given, if they are a norm module's.
    """

    owner: str
    function: str
    on_weight: bool
    reads: str | None = None


@dataclass(frozen=True)
class Run:
    """What one forward pass showed.

    Attributes:
        shapes: canonical path of each norm to its input shapes, in execution order.
        functional: norms that ran as functions, to the shapes of their inputs.
        unusual: owners of such norms that were called with other values than the defaults of their parameters.
        completed: the pass ran to its end.
        error: why it did not.
    """

    shapes: dict[str, Shapes] = field(default_factory=dict)
    functional: dict[FunctionalCall, Shapes] = field(default_factory=dict)
    unusual: frozenset[str] = frozenset()
    completed: bool = False
    error: str | None = None


class _Recorder(TorchFunctionMode):
    """Follows which module runs, and notes norms called as functions outside norm modules."""

    def __init__(self, model: nn.Module, norms: set[nn.Module]) -> None:
        super().__init__()
        self.norms, self.names = norms, {module: name for name, module in model.named_modules()}
        self.running: list[nn.Module] = []
        self.arguments: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self.shapes: dict[str, list[tuple[int, ...]]] = {}
        self.functional: dict[FunctionalCall, list[tuple[int, ...]]] = {}
        self.unusual: set[str] = set()
        self.homes = {id(p): self.names[norm] for norm in norms for p in norm.parameters(recurse=False)}

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.running.append(module)
        self.arguments.append((args, kwargs))
        if module in self.norms:
            x = next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)), None)
            self.shapes.setdefault(self.names[module], []).append(() if x is None else tuple(x.shape))

    def leave(self, *_: object) -> None:
        self.running.pop()
        self.arguments.pop()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in FUNCTIONAL_NORMS and not any(m in self.norms or isinstance(m, ILMNorm) for m in self.running):
            self._note(FUNCTIONAL_NORMS[func], args, kwargs or {})
        return func(*args, **(kwargs or {}))

    def _note(self, function: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs.get("input")
        owner = self.names[self.running[-1]] if self.running else ""
        base = getattr(x, "_base", None)
        on_weight = isinstance(x, nn.Parameter) or isinstance(base, nn.Parameter)
        reads = next((self.homes[id(v)] for v in (*args[1:], *kwargs.values()) if id(v) in self.homes), None)
        call = FunctionalCall(owner, function, on_weight, reads)
        self.functional.setdefault(call, []).append(tuple(x.shape) if isinstance(x, Tensor) else ())
        if self.running and _unusual(self.running[-1], *self.arguments[-1]):
            self.unusual.add(owner)


def _unusual(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a parameter with a default was given something else: a trace takes the defaults."""
    signature = inspect.signature(module.forward)
    given = signature.bind(*args, **kwargs).arguments
    defaults = {p.name: p.default for p in signature.parameters.values() if p.default is not p.empty}
    return any(name in given and given[name] is not value for name, value in defaults.items())


def record_run(model: nn.Module, inputs: Inputs, mode: FakeTensorMode | MetaMode, norms: set[nn.Module]) -> Run:
    """Run ``model`` (a shadow made under ``mode``, which keeps the hooks) once; no data is computed."""
    recorder = _Recorder(model, norms)
    error: str | None = None
    enter, leave = recorder.enter, recorder.leave
    hooks = []
    for module in recorder.names:
        hooks.append(module.register_forward_pre_hook(enter, with_kwargs=True, prepend=True))
        hooks.append(module.register_forward_hook(leave, always_call=True))
    try:
        with quiet("torch._subclasses.fake_tensor"), mode, torch.no_grad(), recorder:
            inputs.map(mode.from_tensor)(model)
    except Exception as failure:  # a forward pass may raise anything; the reason goes into the report
        error = brief(failure)
    for hook in hooks:  # or they would follow later calls of a module, and hold it until the garbage collector runs
        hook.remove()
    return Run(
        {path: tuple(shapes) for path, shapes in recorder.shapes.items()},
        {call: tuple(shapes) for call, shapes in recorder.functional.items()},
        frozenset(recorder.unusual),
        completed=error is None,
        error=error,
    )
