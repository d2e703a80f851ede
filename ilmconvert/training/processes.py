"""One process or many: what Hugging Face ``accelerate`` and torch's FSDP do for a recovery."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed, nn

from ilmconvert.errors import IlmconvertError, UsageError
from ilmconvert.processes import several
from ilmconvert.training.options import RecoverOptions

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["from_main", "prepare", "processes", "same_buffers_"]


@contextlib.contextmanager
def processes(options: RecoverOptions) -> Iterator[Accelerator]:
    """The processes as ``torchrun`` or ``accelerate launch`` started them, or just this one.

    At the end the random state, the process group and accelerate's own global state are as before.

    Raises:
        UsageError: fp16 without a GPU.
        IlmconvertError: ``accelerate`` is not installed, or the device cannot do the precision asked for.
    """
    try:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState
    except ImportError as error:
        raise IlmconvertError(
            "recover needs Hugging Face accelerate, which is not installed; pip install 'ilmconvert[train]'"
        ) from error
    fresh, grouped = not AcceleratorState._shared_state, several()
    on_cpu = options.cpu or not torch.accelerator.is_available()
    if on_cpu and options.precision == "fp16":
        raise UsageError("expected precision 'bf16' or 'no' on a CPU, got 'fp16', which needs a GPU")
    try:
        accelerator = Accelerator(mixed_precision=options.precision, cpu=on_cpu)
    except ValueError as error:
        raise IlmconvertError(f"expected precision={options.precision!r} to work here, but: {error}") from error
    devices = [accelerator.device] if accelerator.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices):
            yield accelerator
        accelerator.wait_for_everyone()  # who leaves early takes its connections along
    finally:
        accelerator.free_memory()  # what holds on to the group goes before it
        if not grouped and several():
            distributed.destroy_process_group()
        if fresh:
            AcceleratorState._reset_state(reset_partial_state=True)


def prepare(
    accelerator: Accelerator, model: nn.Module, groups: Callable[[], list[dict[str, Any]]], options: RecoverOptions
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The model spread over the processes (DDP, or FSDP where asked for), and AdamW for it.

    Args:
        accelerator: of this process.
        model: on the accelerator's device; it may be changed.
        groups: returns the parameter groups; called when the parameters are what they will be.
        options: whether to shard. ``accelerate launch --use_fsdp`` asks for it too.
    """
    sharded = options.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true")
    if sharded and accelerator.distributed_type.value.startswith("MULTI"):  # accelerate itself does not on CPUs
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        fully_shard(model, mesh=init_device_mesh(accelerator.device.type, (accelerator.num_processes,)))
        return model, accelerator.prepare(torch.optim.AdamW(groups()))
    return accelerator.prepare(model, torch.optim.AdamW(groups()))  # type: ignore[no-any-return]


def from_main(accelerator: Accelerator, value: float) -> float:
    """The main process's number, on all of them."""
    if accelerator.num_processes == 1:
        return value
    from accelerate.utils import broadcast_object_list

    return float(broadcast_object_list([value])[0])


def same_buffers_(model: nn.Module) -> None:
    """Give all processes the main one's running statistics: DDP does so before a step, not after, and FSDP never."""
    if several():
        for buffer in model.buffers():
            if buffer.is_floating_point():
                distributed.broadcast(buffer, 0)
