"""Run a model once and keep what went through its sites."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ilmconvert.graph import Inputs
from ilmconvert.graph.inputs import tensors_in
from ilmconvert.probing import fill_zeros_
from ilmconvert.survey.walk import norm_like

__all__ = ["Pass", "perturb_norms", "run_pass"]

Shapes = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Pass:
    """One forward pass.

    Attributes:
        outputs: every tensor in the output.
        shapes: of the outputs.
        sites: path to the shapes in and out of each call, for the sites that ran.
    """

    outputs: list[Tensor]
    shapes: Shapes
    sites: dict[str, Shapes]

    @property
    def finite(self) -> bool:
        """Whether all outputs are."""
        return all(bool(torch.isfinite(t).all()) for t in self.outputs)

    def loss(self) -> Tensor:
        """A number that depends on every output that has a gradient."""
        return torch.stack([t.float().square().mean() for t in self.outputs if t.requires_grad]).sum()


def run_pass(model: nn.Module, inputs: Inputs, paths: list[str], *, lengths: bool = True) -> Pass:
    """Call ``model`` and record the shapes at ``paths``; without ``lengths``, without the first dimension."""
    sites: dict[str, Shapes] = {}
    first = 0 if lengths else 1

    def record(path: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            shapes = (tuple(t.shape[first:]) for t in tensors_in((args, kwargs, output)))
            sites[path] = (*sites.get(path, ()), *shapes)

        return hook

    handles = [model.get_submodule(p).register_forward_hook(record(p), with_kwargs=True) for p in paths]
    try:
        output = inputs(model)
    finally:
        for handle in handles:
            handle.remove()
    outputs = tensors_in(output)
    return Pass(outputs, tuple(tuple(t.shape[first:]) for t in outputs), sites)


@torch.no_grad()
def perturb_norms(model: nn.Module) -> None:
    """Give a fresh model values that leave nothing hidden.

    Scales, shifts and running statistics of norms are drawn at random, and parameters that start at (nearly) zero, as
    the last layer or the scale of a residual branch may, are given values: otherwise equal outputs would say little.
    """
    generator = torch.Generator().manual_seed(0)
    norms = set(norm_like(model))
    fill_zeros_(model)
    for path, module in model.named_modules():
        tensors = (
            *module.named_parameters(recurse=False),
            *(module.named_buffers(recurse=False) if path in norms else ()),
        )
        for name, tensor in tensors:
            if not tensor.is_floating_point() or not tensor.numel():
                continue
            noise = torch.rand(tensor.shape, generator=generator).to(tensor)
            if path in norms and name in ("weight", "running_var"):
                tensor.copy_(noise + 0.5)
            elif path in norms:
                tensor.copy_(0.4 * noise - 0.2)
