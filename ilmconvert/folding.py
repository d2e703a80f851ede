"""Methods that fold Batch Norm into convolutions, which a converted model cannot offer.

``fuse()``, ``reparameterize()`` and their like in timm, torchvision and segmentation_models_pytorch either read running
statistics, which :class:`ilmconvert.nn.ILMNorm` refuses by itself, or pass over what is no Batch Norm and rewrite the
convolutions around it all the same: timm's EfficientViM then computes something else without a word. So each such
method raises where an ILM layer is inside.
"""

from __future__ import annotations

from torch import nn

from ilmconvert.errors import ModelError
from ilmconvert.nn import ILMNorm

__all__ = ["CannotFold", "refuse_folding_"]

_METHODS = ("fuse", "fuse_model", "reparameterize", "switch_to_deploy")
_LIBRARIES = ("timm", "torchvision", "segmentation_models_pytorch")  # elsewhere the names may mean something else


class CannotFold:
    """Stands in for a method that folds norms; calling it raises."""

    def __init__(self, method: str, owner: str) -> None:
        self.method, self.owner = method, owner

    def __call__(self, *_: object, **__: object) -> None:
        """Raise.

        Raises:
            ModelError: always.
        """
        raise ModelError(
            f"expected Batch Norm to fold in {self.owner}.{self.method}(), but it holds ILM layers, which take "
            "their statistics from each instance; use the converted model as it is, or Conversion.revert() it first"
        )


def refuse_folding_(model: nn.Module) -> None:
    """Let folding methods raise on modules that hold an ILM layer, and give them back on all others."""
    for module in model.modules():
        if type(module).__module__.partition(".")[0] not in _LIBRARIES:
            continue
        converted = any(isinstance(m, ILMNorm) for m in module.modules())
        for method in _METHODS:
            if converted and callable(getattr(type(module), method, None)):
                vars(module)[method] = CannotFold(method, type(module).__name__)
            elif isinstance(vars(module).get(method), CannotFold):
                del vars(module)[method]
