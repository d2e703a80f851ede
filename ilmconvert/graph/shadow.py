"""Copies of a model: a real one to convert, and a weightless one to look at.

The caller's model is never traced or run itself. Forward code may cache what it sees (a proxy, a shape) on the module;
on a shadow, that is thrown away with it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.parameter import is_lazy

from ilmconvert.errors import ModelError

__all__ = ["copy_model", "refuse_lazy", "shadow"]


def refuse_lazy(model: nn.Module) -> None:
    """Raise for parameters that get their shape only in the first forward pass.

    Raises:
        ModelError: naming the first such parameter.
    """
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
    return _deepcopy(model, memo)


def _deepcopy(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    for tensor in _computed_tensors(model):
        memo.setdefault(id(tensor), tensor.detach().clone())
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:
        raise ModelError(
            f"expected a model that copy.deepcopy can copy, got {type(model).__name__}, which fails with: {error}. "
            "Remove what cannot be copied (locks, open files, generators) and convert again"
        ) from error


def _computed_tensors(model: nn.Module) -> Iterator[Tensor]:
    """Plain attributes that hold the result of a computation, which deepcopy refuses (torch.nn.utils.weight_norm)."""
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and not value.is_leaf:
                yield value
