"""One forward pass on fake tensors: the shapes that modules return, multiply-accumulates, bytes of activations."""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ilmconvert.graph.inputs import Inputs, tensors_in
from ilmconvert.wording import brief

__all__ = ["Counted", "count"]

Shapes = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Counted:
    """What one forward pass costs.

    Attributes:
        shapes: what each module returned in its first call, by canonical path.
        sizes: bytes of everything each module returned.
        macs: half of torch's count of FLOPs; None where the pass did not end.
        input_shapes: of the tensors given.
        error: why the pass did not end; empty if it did.
    """

    shapes: dict[str, Shapes] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    macs: int | None = None
    input_shapes: Shapes = ()
    error: str = ""

    def bytes_of(self, paths: set[str]) -> int | None:
        """Bytes that the modules at ``paths`` returned together."""
        return None if self.macs is None else sum(size for path, size in self.sizes.items() if path in paths)


def count(model: nn.Module, inputs: Inputs, mode: FakeTensorMode) -> Counted:
    """Run ``model`` (a shadow made under ``mode``) once; no data is computed."""
    shapes: dict[str, Shapes] = {}
    sizes: dict[str, int] = {}
    error, macs = "", None
    counter = FlopCounterMode(display=False)
    model.requires_grad_(False)  # the counter would ask tensors that require gradients for their history
    with ExitStack() as stack:
        for path, module in model.named_modules():

            def note(_: nn.Module, __: Any, output: Any, path: str = path) -> None:
                found = tensors_in(output)
                shapes.setdefault(path, tuple(tuple(t.shape) for t in found))
                sizes[path] = sizes.get(path, 0) + sum(math.prod(t.shape) * t.element_size() for t in found)

            stack.callback(module.register_forward_hook(note).remove)
        try:
            with mode, torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:  # fused attention is not counted
                inputs.map(mode.from_tensor)(model)
            macs = counter.get_total_flops() // 2
        except Exception as failure:  # a forward pass may raise anything; the reason is told
            error = brief(failure, None)
    return Counted(shapes, sizes, macs, tuple(tuple(t.shape) for t in inputs.tensors()), error)
