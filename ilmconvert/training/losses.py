"""What a recovery minimises."""

from __future__ import annotations

from types import TracebackType

import torch
from torch import Tensor, nn

from ilmconvert.errors import UsageError
from ilmconvert.metrics import kl_divergence
from ilmconvert.nn import ILMNorm

__all__ = ["FeatureMatching", "distillation"]


def distillation(original: Tensor, converted: Tensor, temperature: float = 1.0) -> Tensor:
    """Mean KL(original || converted) at a temperature, times its square, which keeps the gradient's size.

    Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", 2015.

    Example:
        >>> logits = torch.randn(4, 10)
        >>> distillation(logits, logits, temperature=4.0).item() < 1e-6
        True
    """
    return temperature**2 * kl_divergence(original, converted, temperature).mean()


class FeatureMatching:
    """How far the outputs of the ILM layers are from those of the norm modules that they replaced.

    Layers in place of function calls have no module to be compared with, and are left out.

    The mean over sites of ``mean((t - s)^2) / var(t)``, the share of the original's variance that is not explained. Use
    as a context: inside, both models are listened to.

    Args:
        original: has the replaced norms, at the paths of the ILM layers.
        converted: the model that is trained.

    Raises:
        UsageError: no ILM layer is at the path of a norm.
    """

    def __init__(self, original: nn.Module, converted: nn.Module) -> None:
        norms = dict(original.named_modules(remove_duplicate=False))
        layers = {name: m for name, m in converted.named_modules() if isinstance(m, ILMNorm)}
        self._pairs = [(norms[name], layer) for name, layer in layers.items() if name in norms]
        if not self._pairs:
            raise UsageError(
                "expected ILM layers at the paths of the original's norms, to compare their outputs, found none among "
                f"{len(layers)} (a norm called as a function has no path); use features=0"
            )
        self._targets: list[list[Tensor]] = [[] for _ in self._pairs]
        self._outputs: list[list[Tensor]] = [[] for _ in self._pairs]
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> FeatureMatching:
        for (norm, layer), targets, outputs in zip(self._pairs, self._targets, self._outputs, strict=True):
            for module, kept in ((norm, targets), (layer, outputs)):
                self._handles.append(module.register_forward_hook(lambda _m, _x, y, kept=kept: kept.append(y.clone())))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for kept in (*self._targets, *self._outputs):
            kept.clear()

    def loss(self) -> Tensor:
        """Of the calls since the context was entered."""
        pairs = [
            pair
            for targets, outputs in zip(self._targets, self._outputs, strict=True)
            for pair in zip(targets, outputs, strict=False)
        ]
        return torch.stack([_unexplained(t.float(), s.float()) for t, s in pairs]).mean()


def _unexplained(target: Tensor, output: Tensor) -> Tensor:
    return (target - output).square().mean() / target.var().clamp_min(1e-8)
