"""Does every ILM layer have a say? Two probes of a (copied) model that find forward code which goes around a layer.

**Reading around.** Outside of its own forward, each layer's scale and shift are made NaN. One pass then shows whether
any other code computes with them: a fused kernel, a folded convolution, a functional call on ``norm.weight``.

**Moving.** The gradient of the outputs with respect to what the decoders predict tells in one pass which layers can
move the output. The few without a gradient are tried out one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ilmconvert.graph import Inputs
from ilmconvert.graph.inputs import tensors_in
from ilmconvert.nn import ILMNorm

__all__ = ["fill_zeros_", "immovable_layers", "instead_of_forward", "layers_read_around", "moves"]

Layers = dict[str, ILMNorm]


def layers_read_around(model: nn.Module, layers: Layers, inputs: Inputs) -> list[str]:
    """The layers whose scale or shift other code than their own forward computes with, in the model's present mode.

    The model's values are the same afterwards. Nothing is found where the output is not finite to begin with.
    """
    if not _finite(model, inputs):
        return []
    elsewhere = {id(p) for m in model.modules() if not isinstance(m, ILMNorm) for p in m.parameters(recurse=False)}

    def spoiled(names: list[str]) -> bool:
        with _poisoned([layers[name] for name in names]):
            return not _finite(model, inputs)

    tied = [n for n, layer in layers.items() if any(id(p) in elsewhere for p in _affine(layer))]  # read by right
    return _bisect([n for n in layers if _affine(layers[n]) and n not in tied], spoiled)


def _bisect(names: list[str], guilty: Callable[[list[str]], bool]) -> list[str]:
    """The names for which ``guilty([name])`` holds, if a group is guilty when a member is."""
    if not names or not guilty(names):
        return []
    if len(names) == 1:
        return names
    half = len(names) // 2
    return _bisect(names[:half], guilty) + _bisect(names[half:], guilty)


def _affine(layer: ILMNorm) -> list[nn.Parameter]:
    """Scale and shift, where they are parameters and not computed."""
    return [p for name in ("weight", "bias") if (p := layer._parameters.get(name)) is not None]


@contextmanager
def _poisoned(layers: Iterable[ILMNorm]) -> Iterator[None]:
    """NaN in scale and shift whenever the layer itself is not running."""
    kept = {p: p.detach().clone() for layer in layers for p in _affine(layer)}

    def run(layer: ILMNorm, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        for parameter in _affine(layer):
            parameter.data.copy_(kept[parameter])
        try:
            return forward(*args, **kwargs)
        finally:
            poison(layer)

    def poison(layer: ILMNorm) -> None:
        for parameter in _affine(layer):
            parameter.data.fill_(float("nan"))

    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(instead_of_forward(layer, partial(run, layer)))
            poison(layer)
        try:
            yield
        finally:
            for parameter, value in kept.items():
                parameter.data.copy_(value)


@contextmanager
def instead_of_forward(module: nn.Module, call: Callable[..., Any]) -> Iterator[None]:
    """Let ``module`` run ``call(forward, *args, **kwargs)``.

    This is no hook: some of torch's fused kernels are taken only where there are no hooks, and would not be seen.
    """
    module.forward = partial(call, module.forward)
    try:
        yield
    finally:
        del module.forward


@torch.no_grad()
def fill_zeros_(model: nn.Module) -> None:
    """Give parameters that start at (nearly) zero other values: the last scale of a residual branch, the head's weight.

    They would hide what happens before them.
    """
    for parameter in model.parameters():
        if parameter.is_floating_point() and parameter.numel() and parameter.abs().max() < 1e-3:
            parameter.data.copy_((0.1 if parameter.ndim == 1 else 0.02) * _noise(parameter))


def immovable_layers(model: nn.Module, layers: Layers, inputs: Inputs) -> list[str]:
    """The layers whose predictions cannot change the output, in the model's present mode.

    See :func:`fill_zeros_` for what to do to a fresh model first.
    """
    if not layers:
        return []
    decoders = {n: layer.predictor.scale_decoder.weight for n, layer in layers.items()}
    decoders |= {f"{n} ": layer.predictor.shift_decoder.weight for n, layer in layers.items()}
    for weight in decoders.values():
        weight.requires_grad_(True)
    with torch.enable_grad():
        total = sum((t.float() * _noise(t)).sum() for t in tensors_in(inputs(model)) if t.requires_grad)
        if isinstance(total, Tensor):
            total.backward()  # a reentrant checkpoint takes no autograd.grad
    moved = {n.strip() for n, w in decoders.items() if w.grad is not None and bool((w.grad != 0).any())}
    model.zero_grad(set_to_none=True)
    return [n for n in layers if n not in moved and not _stirs(model, layers[n], inputs)]


def _stirs(model: nn.Module, layer: ILMNorm, inputs: Inputs) -> bool:
    """Whether the output moves when the predictor is given large weights that no ReLU stops: variances are positive."""
    encoder, decoders = layer.predictor.encoder, (layer.predictor.scale_decoder, layer.predictor.shift_decoder)

    def change() -> None:
        encoder.weight.data.copy_(_noise(encoder.weight).abs() + 0.1)
        for decoder in decoders:
            decoder.weight.data.add_(3 * _noise(decoder.weight))

    return moves(model, inputs, [encoder.weight, *(decoder.weight for decoder in decoders)], change)


@torch.no_grad()
def moves(model: nn.Module, inputs: Inputs, parameters: Sequence[Tensor], change: Callable[[], None]) -> bool:
    """Whether ``change``, which is undone afterwards, of some parameters moves the output."""
    before = inputs.outputs(model)
    kept = [p.detach().clone() for p in parameters]
    try:
        change()
        after = inputs.outputs(model)
    finally:
        for parameter, value in zip(parameters, kept, strict=True):
            parameter.data.copy_(value)
    return len(before) != len(after) or any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))


@torch.no_grad()
def _finite(model: nn.Module, inputs: Inputs) -> bool:
    return all(bool(torch.isfinite(t).all()) for t in inputs.outputs(model) if t.is_floating_point())


def _noise(like: Tensor) -> Tensor:
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(0)).to(like.device, torch.float32)
