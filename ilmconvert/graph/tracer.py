"""A torch.fx tracer that stops at every norm, and at what timm declares untraceable."""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn
from torch.fx.proxy import ParameterProxy

from ilmconvert.norms import find
from ilmconvert.wording import one_line

__all__ = ["FUNCTIONAL_NORMS", "NormTracer", "TraceError", "concrete_defaults", "harmless_read", "trace"]

FUNCTIONAL_NORMS: dict[Callable[..., Any], str] = {
    getattr(module, name): f"{prefix}.{name}"
    for module, prefix in ((torch, "torch"), (torch.nn.functional, "torch.nn.functional"))
    for name in (
        *("batch_norm", "group_norm", "instance_norm", "layer_norm", "rms_norm"),
        *("native_batch_norm", "native_group_norm", "native_layer_norm"),
    )
    if hasattr(module, name)
}
FUNCTIONAL_NORMS |= {  # torch's functions as an exported program calls them, with the same arguments
    getattr(torch.ops.aten, name.rpartition(".")[2]).default: name
    for name in FUNCTIONAL_NORMS.values()
    if name.count(".") == 1 and hasattr(torch.ops.aten, name.rpartition(".")[2])
}


class TraceError(Exception):
    """torch.fx could not follow a module's forward; the message says why."""


class NormTracer(fx.Tracer):
    """Trace a model, keeping each norm module whole.

    Leaves are torch.nn's own modules, every class known to :func:`ilmconvert.norms.find`, ILM layers, and the modules
    that timm registers as not traceable; timm's autowrapped functions stay calls.
    """

    def __init__(self) -> None:
        modules, functions = _timm_leaves()
        super().__init__(autowrap_modules=(math,), autowrap_functions=functions, param_shapes_constant=True)
        self._leaf_types = modules
        self._names: dict[int, str] = {}  # of the root's parameters

    def trace(self, root: nn.Module | Callable[..., Any], concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        """As torch.fx does."""
        if isinstance(root, nn.Module):
            self._names = {id(p): name for name, p in root.named_parameters()}
        return super().trace(root, concrete_args)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, fx.Proxy]) -> Any:
        """As torch.fx does, which goes through all parameters of the root for each that is used."""
        if (name := self._names.get(id(attr_val))) is None:
            return attr_val
        if name not in parameter_proxy_cache:
            parameter_proxy_cache[name] = self.create_proxy(
                "get_attr",
                name,
                (),
                {},
                proxy_factory_fn=lambda node: ParameterProxy(self, node, name, attr_val),
            )
        return parameter_proxy_cache[name]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether ``m`` stays one node."""
        from ilmconvert.nn import ILMNorm

        if isinstance(m, (ILMNorm, *self._leaf_types)) or find(m) is not None:
            return True
        return super().is_leaf_module(m, module_qualified_name)


def trace(module: nn.Module) -> fx.Graph:
    """Trace ``module`` as root; parameters with defaults keep them.

    Raises:
        TraceError: its forward cannot be followed symbolically.
    """
    tracer = NormTracer()
    try:
        return tracer.trace(module, concrete_args=concrete_defaults(module))
    except Exception as error:  # forward code may raise anything when it meets a proxy
        raise TraceError(one_line(error) or type(error).__name__) from error
    finally:
        vars(tracer).clear()  # a cycle in torch.fx keeps it, and with it the module, until the garbage collector runs


def concrete_defaults(module: nn.Module) -> dict[str, Any]:
    """The forward parameters that have a default, with it: ``mask=None`` must not be traced as a given mask."""
    parameters = inspect.signature(module.forward).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}


def _timm_leaves() -> tuple[tuple[type, ...], tuple[Callable[..., Any], ...]]:
    if "timm.layers" not in sys.modules:  # then the model holds nothing of timm's
        return (), ()
    from timm.layers import get_notrace_functions, get_notrace_modules

    return tuple(get_notrace_modules()), tuple(f for f in get_notrace_functions() if callable(f))


def harmless_read(node: fx.Node) -> bool:
    """Whether a tensor is only asked for its dtype, device or shape, or given to a norm function."""
    return all(
        user.target in FUNCTIONAL_NORMS or (user.target is getattr and user.args[1] in ("dtype", "device", "shape"))
        for user in node.users
    )
