"""Run a shadow on fake tensors and record what reaches each norm: order, counts and shapes, whatever torch.fx says."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ilmconvert.graph.inputs import Inputs

__all__ = ["Run", "record_run"]

Shapes = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Run:
    """What one forward pass showed.

    Attributes:
        shapes: norm to its input shapes, in execution order.
        completed: the pass ran to its end.
        error: why it did not.
    """

    shapes: dict[nn.Module, Shapes] = field(default_factory=dict)
    completed: bool = False
    error: str | None = None


def record_run(model: nn.Module, inputs: Inputs, mode: FakeTensorMode, norms: set[nn.Module]) -> Run:
    """Run ``model`` (a shadow made under ``mode``) once; no data is computed."""
    shapes: dict[nn.Module, Shapes] = {}

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)), None)
        shapes[module] = (*shapes.get(module, ()), () if x is None else tuple(x.shape))

    handles = [module.register_forward_pre_hook(record, with_kwargs=True, prepend=True) for module in norms]
    try:
        with mode, torch.no_grad():
            inputs.map(mode.from_tensor)(model)
    except Exception as error:  # a forward pass may raise anything; the reason goes into the report
        return Run(shapes, error=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
    finally:
        for handle in handles:
            handle.remove()
    return Run(shapes, completed=True)
