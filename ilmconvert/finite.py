"""Find the weights that are not numbers, before anything is concluded from a model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from ilmconvert.wording import some

__all__ = ["all_finite", "not_finite", "why_not_finite"]


@torch.no_grad()
def all_finite(modules: Iterable[nn.Module]) -> bool:
    """Whether modules hold neither NaN nor infinity; with one look at a device's memory for all of them."""
    by_device: dict[torch.device, list[Tensor]] = {}
    for module in modules:
        for _, tensor in _values(module):
            by_device.setdefault(tensor.device, []).append(_sum(tensor))
    return all(bool(torch.stack(sums).isfinite().all()) for sums in by_device.values())


@torch.no_grad()
def not_finite(model: nn.Module) -> tuple[str, ...]:
    """The names of parameters and buffers that hold NaN or infinity; none where there are no values (meta device).

    Example:
        >>> layer = nn.Linear(2, 1)
        >>> layer.bias.data.fill_(float("nan"))
        tensor([nan])
        >>> not_finite(layer)
        ('bias',)
    """
    return tuple(name for name, tensor in _values(model) if not _sum(tensor).isfinite())


def why_not_finite(model: nn.Module) -> str:
    """Where to look when what a model gives out is not finite."""
    names = not_finite(model)
    if not names:
        return "all that it holds is, so look at its inputs"
    return f"it holds NaN or infinity in {some(names)}"


def _values(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        wide = tensor.is_floating_point() and tensor.element_size() > 1  # there is no arithmetic with 8 bits
        plain = type(tensor.detach()) is Tensor and tensor.layout is torch.strided  # no shard, no fake
        if wide and plain and not tensor.is_meta:
            yield name, tensor


def _sum(tensor: Tensor) -> Tensor:
    """Not finite if an element is not; and it needs no memory, as a look at each would."""
    return tensor.sum(dtype=torch.promote_types(tensor.dtype, torch.float32))
