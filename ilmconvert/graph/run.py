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
from torch.utils._pytree import tree_flatten

from ilmconvert.graph.inputs import Inputs, tensors_in
from ilmconvert.graph.meta import MetaMode
from ilmconvert.graph.owner import traced_forward
from ilmconvert.graph.tracer import FUNCTIONAL_NORMS, TraceError
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
        losses: owners of such norms to what their forward, written anew from its graph, did otherwise here.
        completed: the pass ran to its end.
        error: why it did not.
    """

    shapes: dict[str, Shapes] = field(default_factory=dict)
    functional: dict[FunctionalCall, Shapes] = field(default_factory=dict)
    losses: dict[str, str] = field(default_factory=dict)
    completed: bool = False
    error: str | None = None


@dataclass
class _Pass:
    """One call of a module, with what its own forward did: functions that returned tensors, and modules called."""

    module: nn.Module
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    steps: list[Any] = field(default_factory=list)
    output: Any = None
    norms: bool = False


class _Recorder(TorchFunctionMode):
    """Follows which module runs, and notes norms called as functions outside norm modules."""

    def __init__(self, model: nn.Module, norms: set[nn.Module]) -> None:
        super().__init__()
        self.norms, self.names = norms, {module: name for name, module in model.named_modules()}
        self.running: list[_Pass] = []
        self.owners: list[_Pass] = []
        self.again = False
        self.shapes: dict[str, list[tuple[int, ...]]] = {}
        self.functional: dict[FunctionalCall, list[tuple[int, ...]]] = {}
        self.homes = {id(p): self.names[norm] for norm in norms for p in norm.parameters(recurse=False)}

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.running:
            self.running[-1].steps.append(module)
        self.running.append(_Pass(module, args, kwargs))
        if module in self.norms and not self.again:
            x = next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)), None)
            self.shapes.setdefault(self.names[module], []).append(() if x is None else tuple(x.shape))

    def leave(self, _: nn.Module, __: Any, output: Any) -> None:
        done = self.running.pop()
        if done.norms and not self.again:
            done.output = _kinds(output)
            self.owners.append(done)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in FUNCTIONAL_NORMS and not self.again and not any(map(self._is_norm, self.running)):
            self._note(FUNCTIONAL_NORMS[func], args, kwargs or {})
        result = func(*args, **(kwargs or {}))
        if self.running and tensors_in(result):
            self.running[-1].steps.append(func)
        return result

    def _is_norm(self, running: _Pass) -> bool:
        return running.module in self.norms or isinstance(running.module, ILMNorm)

    def _note(self, function: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs.get("input")
        owner = self.names[self.running[-1].module] if self.running else ""
        base = getattr(x, "_base", None)
        on_weight = isinstance(x, nn.Parameter) or isinstance(base, nn.Parameter)
        reads = next((self.homes[id(v)] for v in (*args[1:], *kwargs.values()) if id(v) in self.homes), None)
        call = FunctionalCall(owner, function, on_weight, reads)
        self.functional.setdefault(call, []).append(tuple(x.shape) if isinstance(x, Tensor) else ())
        if self.running and not on_weight:
            self.running[-1].norms = True

    def repeat(self, before: _Pass, forward: Callable[..., Any]) -> str | None:
        """What ``forward`` does otherwise than the module's own did when it was given the same; None for nothing."""
        self.again, self.running = True, [now := _Pass(before.module)]
        try:
            output = forward(before.module, *before.args, **before.kwargs)
        except Exception as failure:  # written for other inputs, it may raise anything
            return f"written anew from torch.fx's graph, the forward around it fails with {brief(failure)}"
        finally:
            self.again, self.running = False, []
        if (now.steps, _kinds(output)) != (before.steps, before.output):
            return "written anew from torch.fx's graph, the forward around it does something else with what it is given"
        return None


def _kinds(output: Any) -> tuple[Any, ...]:
    """The containers of an output and the classes in them."""
    leaves, containers = tree_flatten(output)
    return containers, [type(leaf) for leaf in leaves]


def _is_unusual(run: _Pass) -> bool:
    """Whether a parameter with a default was given something else: a trace takes the defaults."""
    signature = inspect.signature(run.module.forward)
    given = signature.bind(*run.args, **run.kwargs).arguments
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
    losses: dict[str, str] = {}
    for run in recorder.owners:
        if (owner := recorder.names[run.module]) not in losses and (why := _loss(run, recorder, mode)) is not None:
            losses[owner] = why
    for hook in hooks:  # or they would follow later calls of a module, and hold it until the garbage collector runs
        hook.remove()
    return Run(
        {path: tuple(shapes) for path, shapes in recorder.shapes.items()},
        {call: tuple(shapes) for call, shapes in recorder.functional.items()},
        losses,
        completed=error is None,
        error=error,
    )


def _loss(run: _Pass, recorder: _Recorder, mode: FakeTensorMode | MetaMode) -> str | None:
    """What would be lost of an owner's pass if its forward were written anew from its graph; None for nothing."""
    if _is_unusual(run):
        return "its module is called with other values than the defaults of its parameters"
    try:
        forward = traced_forward(run.module)
    except TraceError:  # which is found out, and told, where the calls of each owner are looked for
        return None
    with quiet("torch._subclasses.fake_tensor"), mode, torch.no_grad(), recorder:
        return recorder.repeat(run, forward)
