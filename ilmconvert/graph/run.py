"""Run a shadow on fake tensors and record what reaches each norm: order, counts and shapes, whatever torch.fx says."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from ilmconvert.graph.inputs import Inputs
from ilmconvert.graph.tracer import FUNCTIONAL_NORMS

__all__ = ["FunctionalCall", "Run", "record_run"]

Shapes = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class FunctionalCall:
    """A norm that ran as a function: the path of the module that called it, the function, and whether on a weight."""

    owner: str
    function: str
    on_weight: bool


@dataclass(frozen=True)
class Run:
    """What one forward pass showed.

    Attributes:
        shapes: norm to its input shapes, in execution order.
        functional: norms that ran as functions.
        completed: the pass ran to its end.
        error: why it did not.
    """

    shapes: dict[nn.Module, Shapes] = field(default_factory=dict)
    functional: tuple[FunctionalCall, ...] = ()
    completed: bool = False
    error: str | None = None


class _Recorder(TorchFunctionMode):
    """Follows which module runs, and notes norms called as functions outside norm modules."""

    def __init__(self, model: nn.Module, norms: set[nn.Module]) -> None:
        super().__init__()
        self.norms, self.names = norms, {module: name for name, module in model.named_modules()}
        self.running: list[nn.Module] = []
        self.shapes: dict[nn.Module, Shapes] = {}
        self.functional: dict[FunctionalCall, None] = {}

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.running.append(module)
        if module in self.norms:
            x = next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)), None)
            self.shapes[module] = (*self.shapes.get(module, ()), () if x is None else tuple(x.shape))

    def leave(self, *_: object) -> None:
        self.running.pop()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in FUNCTIONAL_NORMS and not self.norms.intersection(self.running):
            x = args[0] if args else (kwargs or {}).get("input")
            owner = self.names[self.running[-1]] if self.running else ""
            base = getattr(x, "_base", None)
            on_weight = isinstance(x, nn.Parameter) or isinstance(base, nn.Parameter)
            self.functional[FunctionalCall(owner, FUNCTIONAL_NORMS[func], on_weight)] = None
        return func(*args, **(kwargs or {}))


def record_run(model: nn.Module, inputs: Inputs, mode: FakeTensorMode, norms: set[nn.Module]) -> Run:
    """Run ``model`` (a shadow made under ``mode``) once; no data is computed."""
    recorder = _Recorder(model, norms)
    error: str | None = None
    with ExitStack() as stack:
        for module in recorder.names:
            stack.callback(module.register_forward_pre_hook(recorder.enter, with_kwargs=True, prepend=True).remove)
            stack.callback(module.register_forward_hook(recorder.leave, always_call=True).remove)
        try:
            with mode, torch.no_grad(), recorder:
                inputs.map(mode.from_tensor)(model)
        except Exception as failure:  # a forward pass may raise anything; the reason goes into the report
            error = f"{type(failure).__name__}: {' '.join(str(failure).split())[:300]}"
    return Run(recorder.shapes, tuple(recorder.functional), completed=error is None, error=error)
