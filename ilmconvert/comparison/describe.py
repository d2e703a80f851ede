"""What one module is: its class, plain attributes, parameters and buffers, as a node tells it."""

from __future__ import annotations

import enum
from dataclasses import fields, is_dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from ilmconvert.comparison.nodes import Role, TensorInfo
from ilmconvert.nn import ILMNorm
from ilmconvert.norms import find

__all__ = ["attributes", "constant", "names_of_tensors", "role_of", "tensors_of"]

# the modes of a run and torch's switch for a fused kernel: they do not tell what the module computes
_NOT_STRUCTURE = frozenset({"training", "activation_relu_or_gelu", "call_super_init", "dump_patches"})


def role_of(module: nn.Module) -> Role:
    """Whether it is an ILM layer, a norm or neither."""
    if isinstance(module, ILMNorm):
        return "ilm"
    return "norm" if find(module) is not None else ""


def attributes(module: nn.Module) -> dict[str, str]:
    """The public attributes of a module that are plain values, as Python prints them; what is None is left out."""
    result: dict[str, str] = {}
    for name, value in vars(module).items():
        if name.startswith("_") or name in _NOT_STRUCTURE or value is None:
            continue
        if is_dataclass(value) and not isinstance(value, type):  # an ILM layer's stage 1
            parts = {f.name: getattr(value, f.name) for f in fields(value)}
            result |= {k: text for k, v in parts.items() if v is not None and (text := constant(v)) is not None}
        elif (text := constant(value)) is not None:
            result[name] = text
    return result


def constant(value: Any) -> str | None:
    """A plain value as text; None for what is no plain value. It never holds an address, so that it is stable.

    Example:
        >>> constant((3, 3)), constant(torch.float16), constant(torch.relu), constant(object())
        ('(3, 3)', 'torch.float16', 'relu', None)
    """
    if isinstance(value, partial):
        value = value.func
    if value is None or isinstance(value, (bool, int, float, complex, str, torch.dtype, torch.device, enum.Enum)):
        return str(value) if isinstance(value, (str, enum.Enum)) else repr(value)
    if isinstance(value, (tuple, list)):
        parts = [constant(v) for v in value]
        if any(p is None for p in parts):
            return None
        comma = "," if len(parts) == 1 else ""
        return f"({', '.join(p for p in parts if p is not None)}{comma})"
    if isinstance(value, slice):
        return f"{value.start}:{value.stop}:{value.step}"
    if callable(value) and not isinstance(value, nn.Module):
        return getattr(value, "__name__", None)
    return None


def names_of_tensors(model: nn.Module) -> dict[int, str]:
    """The first full name of every parameter and buffer, by identity."""
    return {id(tensor): name for name, tensor in (*model.named_buffers(), *model.named_parameters())}


def tensors_of(path: str, module: nn.Module, first_names: dict[int, str], *, whole: bool) -> tuple[TensorInfo, ...]:
    """The parameters and buffers of a module, with those of the modules inside if it is taken as a whole."""
    unsaved = {
        f"{inner}.{name}" if inner else name
        for inner, child in module.named_modules(remove_duplicate=False)
        for name in child._non_persistent_buffers_set
    }
    found = []
    parameters = module.named_parameters(recurse=whole, remove_duplicate=False)
    for name, tensor in (*parameters, *module.named_buffers(recurse=whole, remove_duplicate=False)):
        full = f"{path}.{name}" if path else name
        first = first_names.get(id(tensor), full)
        found.append(
            TensorInfo(
                name,
                "parameter" if isinstance(tensor, nn.Parameter) else "buffer",
                tuple(tensor.shape),
                str(tensor.dtype).removeprefix("torch."),
                saved=name not in unsaved,
                tied="" if first == full else first,
            )
        )
    return tuple(found)
