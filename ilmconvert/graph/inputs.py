"""What a model is called with: given by the user, or the input size that a timm model declares."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from ilmconvert.errors import UsageError

__all__ = ["Inputs", "check_model", "example_inputs", "first_tensor", "same_noise", "tensors_in"]


@dataclass(frozen=True)
class Inputs:
    """Positional and keyword arguments of one forward call."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def map(self, fn: Callable[[Tensor], Tensor]) -> Inputs:
        """Apply ``fn`` to every tensor, nested ones included."""
        args, kwargs = tree_map_only(Tensor, fn, (self.args, dict(self.kwargs)))
        return Inputs(args, kwargs)

    def tensors(self) -> list[Tensor]:
        """Every tensor, nested ones included."""
        return tensors_in((self.args, dict(self.kwargs)))

    def suited(self, model: nn.Module) -> Inputs:
        """The same on ``model``'s device, floating-point ones in its dtype."""
        if (like := first_tensor(model)) is None:
            return self
        return self.map(lambda t: t.to(like.device, like.dtype if t.is_floating_point() else None))

    def copied(self) -> Inputs:
        """The same with tensors of their own, for what may change them in place; one given twice stays one."""
        copies: dict[int, Tensor] = {}
        return self.map(lambda t: copies.setdefault(id(t), t.clone()))

    def __call__(self, model: nn.Module) -> Any:
        """Call ``model`` with (copies of) these arguments."""
        given = self.copied()
        return model(*given.args, **given.kwargs)

    def outputs(self, model: nn.Module) -> list[Tensor]:
        """All tensors that ``model`` returns for these arguments, its random numbers the same every time."""
        with same_noise():
            return tensors_in(self(model))


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors among nested containers."""
    return [v for v in tree_leaves(value) if isinstance(v, Tensor)]


@contextmanager
def same_noise(seed: int = 0) -> Iterator[None]:
    """Random numbers from a fixed seed, for models that draw some in evaluation too; the caller's go on afterwards."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        yield


def check_model(model: object) -> None:
    """Raise for what is no module, a :class:`ilmconvert.Conversion` for example.

    Raises:
        UsageError: it is none.
    """
    if not isinstance(model, nn.Module):
        hint = "; give its model" if isinstance(getattr(model, "model", None), nn.Module) else ""
        raise UsageError(f"expected a torch.nn.Module, got {type(model).__name__}{hint}")


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
        UsageError: ``given`` is none of those, or a size that has not the dimensions and channels of the declared one.
    """
    if given is not None:
        return _wrap(given)
    declared = _declared_size(model)
    size = input_size or declared
    if size is None:
        return None
    if declared and (len(size) != len(declared) or size[0] != declared[0]):
        raise UsageError(f"expected an input size like {declared} for {type(model).__name__}, got {tuple(size)}")
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
