"""Running on meta tensors: an operation costs its arithmetic of shapes and nothing more.

A fake tensor knows that it has no values *and* which device it is on, and pays for that with a dispatch in Python, some
ten times the price of the same operation on torch's meta device. A forward pass hardly ever needs to know more than the
answer to ``x.device``, and :class:`MetaMode` gives the one that the real tensor would.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["MetaMode"]

_META = torch.device("meta")
_KINDS = ("cpu", "cuda", "meta", "mps", "xla", "xpu")


class MetaMode(TorchFunctionMode):
    """Within it, tensors are made on the meta device, and say that they are on ``device``.

    Where forward code asks for values, or mixes meta tensors with others, it raises.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._answers: dict[Callable[..., Any], Any] = {Tensor.device.__get__: device}
        self._answers |= {getattr(Tensor, f"is_{kind}").__get__: device.type == kind for kind in _KINDS}

    def from_tensor(self, tensor: Tensor) -> Tensor:
        """The shape, strides and dtype of ``tensor``."""
        return tensor.detach().to(_META)

    def __enter__(self) -> MetaMode:
        _META.__enter__()
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *failure: Any) -> None:
        super().__exit__(*failure)  # type: ignore[no-untyped-call]
        _META.__exit__(*failure)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in self._answers:
            return self._answers[func]
        if func in (Tensor.cpu, Tensor.cuda):
            return args[0]
        kwargs = kwargs or {}
        if func in _KNOWN and (known := _KNOWN[func](*args, **kwargs)) is not None:
            return known
        if func is Tensor.to or any(isinstance(v, torch.device) for v in args):
            args = tuple(_META if isinstance(v, (torch.device, str)) else v for v in args)
        return func(*args, **({**kwargs, "device": _META} if kwargs.get("device") is not None else kwargs))


# Many operations are written out in Python on the meta device, and take longer there than on real data. Below is what
# the most frequent of them return; None, so that torch does it, where it might be something else or an error.


def _same(x: Tensor) -> Tensor | None:
    dense = x.is_contiguous() or (x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last))
    return x.detach() if dense and x.is_floating_point() else None


def _activation(input: Tensor, *_: Any, **__: Any) -> Tensor | None:  # noqa: A002  (torch's names: they may be keywords)
    return _same(input)


def _add(input: Tensor, other: Any, *more: Any, **options: Any) -> Tensor | None:  # noqa: A002
    alike = isinstance(other, Tensor) and input.dtype == other.dtype and input.shape == other.shape
    plain = alike and input.stride() == other.stride() and not more and not options
    return _same(input) if plain else None


def _batch_norm(
    input: Tensor,  # noqa: A002
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    *_: Any,
    **__: Any,
) -> Tensor | None:
    several = not training or input.numel() > input.shape[1]
    fits = several and _have(input.shape[1:2], running_mean, running_var, weight, bias)
    return _same(input) if fits else None


def _group_norm(
    input: Tensor,  # noqa: A002
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *_: Any,
    **__: Any,
) -> Tensor | None:
    several = input.shape[1] % num_groups == 0 and input.numel() > input.shape[0] * num_groups
    return _same(input) if several and _have(input.shape[1:2], weight, bias) else None


def _layer_norm(
    input: Tensor,  # noqa: A002
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *_: Any,
    **__: Any,
) -> Tensor | None:
    shape = torch.Size(normalized_shape)
    fits = len(shape) > 0 and input.shape[-len(shape) :] == shape and _have(shape, weight, bias)
    return _same(input) if fits and input.is_contiguous() else None


def _have(shape: torch.Size, *tensors: Tensor | None) -> bool:
    return all(t is None or t.shape == shape for t in tensors)


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:  # noqa: A002
    fits = weight.ndim == 2 and input.shape[-1:] == weight.shape[1:] and _have(weight.shape[:1], bias)
    if not fits or any(t is not None and t.dtype != input.dtype for t in (weight, bias)):
        return None
    return torch.empty((*input.shape[:-1], weight.shape[0]), dtype=input.dtype, device=_META)


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *_: Any, **__: Any
) -> Tensor | None:
    fits = query.shape[:-2] == key.shape[:-2] == value.shape[:-2] and key.shape[-2] == value.shape[-2]
    if attn_mask is not None or query.ndim != 4 or not fits or query.shape[-1] != key.shape[-1]:
        return None
    batch, heads, length, width = *query.shape[:-1], value.shape[-1]
    return torch.empty((batch, length, heads, width), dtype=query.dtype, device=_META).transpose(1, 2)


_KNOWN: dict[Callable[..., Any], Callable[..., Tensor | None]] = {
    **dict.fromkeys((F.relu, F.relu6, F.hardtanh, F.gelu, F.silu, F.hardswish, F.hardsigmoid), _activation),
    Tensor.add: _add,
    F.batch_norm: _batch_norm,
    F.group_norm: _group_norm,
    F.layer_norm: _layer_norm,
    F.linear: _linear,
    F.scaled_dot_product_attention: _attention,
}
