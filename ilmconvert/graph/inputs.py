"""What a model is called with: given by the user, or the input size that a timm model declares."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ilmconvert.errors import UsageError

__all__ = ["Inputs", "example_inputs", "first_tensor"]


@dataclass(frozen=True)
class Inputs:
    """Positional and keyword arguments of one forward call."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def map(self, fn: Callable[[Tensor], Tensor]) -> Inputs:
        """Apply ``fn`` to every tensor, nested ones included."""
        args, kwargs = tree_map(lambda v: fn(v) if isinstance(v, Tensor) else v, (self.args, dict(self.kwargs)))
        return Inputs(args, kwargs)

    def __call__(self, model: nn.Module) -> Any:
        """Call ``model`` with these arguments."""
        return model(*self.args, **self.kwargs)


def first_tensor(module: nn.Module) -> Tensor | None:
    """The first floating-point parameter or buffer: it tells a module's device and dtype."""
    tensors = (t for group in (module.parameters(), module.buffers()) for t in group)
    return next((t for t in tensors if t.is_floating_point()), None)


def example_inputs(
    model: nn.Module,
    given: Any = None,
    *,
    input_size: Sequence[int] | None = None,
    batch_size: int = 2,
    make: Callable[..., Tensor] | None = None,
) -> Inputs | None:
    """The inputs to run ``model`` with, or None when no size is known.

    Args:
        model: gives device and dtype, and for timm models the declared input size.
        given: a tensor, a tuple or list of positional arguments, or a dict of keyword arguments.
        input_size: the shape of one sample, without the batch dimension.
        batch_size: samples in a generated input (standard normal values, from a fixed seed).
        make: makes a tensor of a size instead, where values do not matter.

    Raises:
        UsageError: ``given`` is none of those.
    """
    if given is not None:
        return _wrap(given)
    size = input_size or _declared_size(model)
    if size is None:
        return None
    like = first_tensor(model)
    device, dtype = (None, None) if like is None else (like.device, like.dtype)
    x = (make or _normal)(batch_size, *size)
    return Inputs((x.to(device=device, dtype=dtype),))


def _normal(*size: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(0))


def _wrap(given: Any) -> Inputs:
    if isinstance(given, Inputs):
        return given
    if isinstance(given, Tensor):
        return Inputs((given,))
    if isinstance(given, Mapping):
        return Inputs((), given)
    if isinstance(given, (tuple, list)):
        return Inputs(tuple(given))
    raise UsageError(
        f"expected example_inputs to be a tensor, a tuple of arguments or a dict of keyword arguments, got "
        f"{type(given).__name__}"
    )


def _declared_size(model: nn.Module) -> tuple[int, ...] | None:
    if not getattr(model, "pretrained_cfg", None):
        return None
    from timm.models import get_model_input_config

    return tuple(get_model_input_config(model)["input_size"])
