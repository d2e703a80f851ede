"""The state of a run in one safetensors file: written beside and renamed, so that it is always a whole one.

Weights, optimizer state and the best weights so far are stored unsharded under their full names, so a run may go on
with another number of processes, with DDP or FSDP. Random numbers need no state: they are drawn from the step's number.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from ilmconvert.disk import writing
from ilmconvert.errors import CheckpointError
from ilmconvert.wording import one_line

__all__ = ["CHECKPOINT", "JOURNAL", "RunState", "full_weights", "is_run_file", "read_state", "restore_", "write_state"]

CHECKPOINT = "checkpoint.safetensors"
JOURNAL = "recover.jsonl"
_NEW = f".{CHECKPOINT}.new"
_FULL = StateDictOptions(full_state_dict=True)
_PARTLY = StateDictOptions(full_state_dict=True, strict=False)  # a parameter that no loss has reached yet has no state


@dataclass(frozen=True)
class RunState:
    """Where a run stands.

    Attributes:
        progress: plain data: steps, time, evaluations, and what the run was started with.
        best: the best weights so far.
        weights: the present ones.
        optimizer: its state by parameter and name.
    """

    progress: dict[str, Any]
    best: dict[str, Tensor]
    weights: dict[str, Tensor]
    optimizer: dict[str, dict[str, Tensor]]


def full_weights(model: nn.Module) -> dict[str, Tensor]:
    """The whole state dict of a plain, DDP or FSDP model; every process calls it and gets all of it."""
    whole: Any = get_model_state_dict(model, options=_FULL)
    return whole  # type: ignore[no-any-return]


def write_state(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    best: dict[str, Tensor],
    progress: dict[str, Any],
    *,
    main: bool,
) -> None:
    """Write the state; every process calls it, the main one writes.

    Raises:
        IlmconvertError: the disk refuses.
    """
    state: Any = {}
    if optimizer.state:  # asked for sooner, torch makes one by a step of its own, which counts
        state = get_optimizer_state_dict(model, optimizer, options=_FULL)["state"]
    parts = {"weights": full_weights(model), "best": best}
    tensors = {f"{part}:{name}": value for part, values in parts.items() for name, value in values.items()}
    for name, values in state.items():
        tensors |= {f"optimizer:{name}:{key}": torch.as_tensor(value) for key, value in values.items()}
    if not main:
        return
    beside = folder / _NEW
    apart = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        save_file(apart, str(beside), metadata={"progress": json.dumps(progress)})
        beside.replace(folder / CHECKPOINT)


def is_run_file(name: str) -> bool:
    """Whether a run leaves files of that name in its folder; safetensors begins one with a name of its own."""
    return name in (CHECKPOINT, _NEW, JOURNAL) or name.startswith(".tmp")


def read_state(folder: Path) -> RunState:
    """Read what :func:`write_state` wrote.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    file = folder / CHECKPOINT
    if not file.is_file():
        raise CheckpointError(f"expected a run to go on with at {str(folder)!r}, found no {CHECKPOINT}")
    parts: dict[str, Any] = {"weights": {}, "best": {}, "optimizer": {}}
    try:
        with safe_open(file, "pt") as stored:
            progress = json.loads(stored.metadata()["progress"])
            for name in stored.keys():  # noqa: SIM118
                part, _, rest = name.partition(":")
                if part == "optimizer":
                    parameter, _, key = rest.rpartition(":")
                    parts[part].setdefault(parameter, {})[key] = stored.get_tensor(name)
                else:
                    parts[part][rest] = stored.get_tensor(name)
    except Exception as error:
        raise CheckpointError(f"the state of the run at {str(file)!r} cannot be read: {one_line(error)}") from error
    return RunState(progress, **parts)


def restore_(state: RunState, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Put weights and optimizer state back, sharded as the model is; every process calls it."""
    set_model_state_dict(model, {**state.weights}, options=_FULL)
    if not state.optimizer:
        return
    groups = get_optimizer_state_dict(model, optimizer, options=_FULL)["param_groups"]
    whole: Any = {"state": state.optimizer, "param_groups": groups}
    set_optimizer_state_dict(model, optimizer, whole, options=_PARTLY)
