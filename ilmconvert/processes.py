"""One process or several: the group that ``torchrun`` asks for, and what its processes know together."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, distributed

__all__ = ["from_all", "process_group", "several", "summed"]


def several() -> bool:
    """Whether this process belongs to a group."""
    return distributed.is_available() and distributed.is_initialized()


def summed(value: Tensor) -> Tensor:
    """The sum over all processes, in place; every process calls it."""
    if several():
        distributed.all_reduce(value)
    return value


@contextlib.contextmanager
def process_group() -> Iterator[tuple[int, int]]:
    """(rank, world size) of this process, in a group if ``torchrun`` started several and there is none yet.

    Example:
        >>> with process_group() as (rank, world_size):
        ...     rank, world_size
        (0, 1)
    """
    asked = int(os.environ.get("WORLD_SIZE", "1")) > 1
    ours = asked and not several()
    if ours:
        distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield (distributed.get_rank(), distributed.get_world_size()) if asked else (0, 1)
        if ours:
            distributed.barrier()  # who leaves early takes its connections along
    finally:
        if ours:
            distributed.destroy_process_group()


def from_all(value: dict[Any, Any]) -> dict[Any, Any]:
    """The entries of all processes together, on all of them."""
    if not several():
        return value
    found: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(found, value)
    return {key: item for part in found for key, item in part.items()}
