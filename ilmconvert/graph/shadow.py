"""Copies of a model: a real one to convert, and a weightless one to look at.

The caller's model is never traced or run itself. Forward code may cache what it sees (a proxy, a shape) on the module;
on a shadow, that is thrown away with it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.parameter import is_lazy

from ilmconvert.errors import ModelError

__all__ = ["copy_model", "refuse_opaque", "shadow"]


def refuse_opaque(model: nn.Module) -> None:
    """Raise for what cannot be looked into: TorchScript, and parameters without a shape yet.

    Raises:
        ModelError: naming the first such module or parameter.
    """
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise ModelError(
                f"expected Python modules, got TorchScript at {name!r}, whose norms cannot be seen; convert the model "
                "before scripting it"
            )
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            raise ModelError(
                f"expected initialised parameters, got an uninitialised one at {name!r} (a lazy module): its width is "
                "not known yet; run one forward pass, then convert"
            )


def copy_model(model: nn.Module) -> nn.Module:
    """A deep copy, modes and hooks included.

    Raises:
        ModelError: the model cannot be deep-copied.
    """
    return _deepcopy(model, {})


def shadow(model: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """A deep copy whose parameters and buffers are fake: shapes and dtypes without memory."""
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        fake = mode.from_tensor(tensor.detach())
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(fake, requires_grad=tensor.requires_grad) if is_parameter else fake
    result = _deepcopy(model, memo)
    for module in result.modules():
        _drop_user_hooks(module)
    return result


def _drop_user_hooks(module: nn.Module) -> None:
    """The user's hooks must not see fake tensors; torch's own (pruning, weight_norm) compute weights and stay."""
    for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
        hooks = vars(module).get(name, {})
        for key, hook in list(hooks.items()):
            home = getattr(hook, "__module__", None) or type(hook).__module__
            if not home.startswith("torch."):
                del hooks[key]


def _deepcopy(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    for tensor in _computed_tensors(model):
        memo.setdefault(id(tensor), tensor.detach().clone())
    try:
        result = copy.deepcopy(model, memo)
    except Exception as error:
        raise ModelError(
            f"expected a model that copy.deepcopy can copy, got {type(model).__name__}, which fails with: {error}. "
            "Remove what cannot be copied (locks, open files, generators) and convert again"
        ) from error
    if shared := set(result.modules()) & set(model.modules()):
        names = ", ".join(sorted({type(m).__name__ for m in shared}))
        raise ModelError(
            f"expected copy.deepcopy to copy every module, but it returns the model's own {names} (a __deepcopy__ that "
            "copies nothing?); converting would change the model itself"
        )
    return result


def _computed_tensors(model: nn.Module) -> Iterator[Tensor]:
    """Plain attributes that hold the result of a computation, which deepcopy refuses (torch.nn.utils.weight_norm)."""
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and not value.is_leaf:
                yield value
