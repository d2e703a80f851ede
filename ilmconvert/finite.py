"""Find the weights that are not numbers, before anything is concluded from a model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

__all__ = ["all_finite", "not_finite", "told_not_finite"]


def all_finite(modules: Iterable[nn.Module]) -> bool:
    """Whether small modules hold neither NaN nor infinity, in few operations."""
    by_device: dict[torch.device, list[Tensor]] = {}
    for module in modules:
        for _, tensor in _values(module):
            by_device.setdefault(tensor.device, []).append(tensor.detach().reshape(-1))
    return all(bool(torch.cat(tensors).isfinite().all()) for tensors in by_device.values())


def not_finite(model: nn.Module) -> tuple[str, ...]:
    """The names of parameters and buffers that hold NaN or infinity; none where there are no values (meta device).

    Example:
        >>> layer = nn.Linear(2, 1)
        >>> layer.bias.data.fill_(float("nan"))
        tensor([nan])
        >>> not_finite(layer)
        ('bias',)
    """
    return tuple(name for name, tensor in _values(model) if not torch.isfinite(_sum(tensor)))


def told_not_finite(model: nn.Module) -> str:
    """The same in words; empty if there are none."""
    names = not_finite(model)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"it holds NaN or infinity in {', '.join(names[:3])}{more}" if names else ""


def _values(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        wide = tensor.is_floating_point() and tensor.element_size() > 1  # there is no arithmetic with 8 bits
        plain = type(tensor.detach()) is Tensor and tensor.layout is torch.strided  # no shard, no fake
        if wide and plain and not tensor.is_meta:
            yield name, tensor


@torch.no_grad()
def _sum(tensor: Tensor) -> Tensor:
    """It is not finite if an element is not; and needs no memory, as a look at each element would."""
    return tensor.sum(dtype=torch.promote_types(tensor.dtype, torch.float32))
