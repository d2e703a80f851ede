"""``timm.create_model("ilmconvert", folder="resnet18-ilm")``: converted folders through timm's own door.

timm's training script builds its model by name; with ``import ilmconvert`` before it, ``--model ilmconvert
--model-kwargs folder=resnet18-ilm`` trains a converted one. ``import ilmconvert`` imports neither torch nor timm: the
name is registered at once if timm is there, and otherwise when timm is imported.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from importlib.machinery import ModuleSpec

    from torch import nn

__all__ = ["ilmconvert", "when_timm_is_imported"]


def ilmconvert(
    pretrained: bool = False,
    folder: str = "",
    num_classes: int | None = None,
    trust_factory: bool = False,
    **other: Any,
) -> nn.Module:
    """A converted model with its weights, as a timm entry point.

    Args:
        pretrained: accepted and of no effect: the folder's weights are loaded either way.
        folder: a saved conversion.
        num_classes: reset the classifier to this many classes, if the model has another number.
        trust_factory: as in :func:`ilmconvert.load`.
        other: what timm's callers pass to every model: ``in_chans`` must be the folder's, dropout rates zero.

    Raises:
        UsageError: no folder, or an argument that a converted model cannot follow.
    """
    from ilmconvert.checkpoint import load
    from ilmconvert.errors import UsageError

    if not folder:
        raise UsageError('expected timm.create_model("ilmconvert", folder=...) with a folder saved by ilmconvert')
    model = load(folder, trust_factory=trust_factory)
    if unfit := sorted(name for name, value in other.items() if not _fits(model, name, value)):
        raise UsageError(
            f"expected folder= and num_classes= alone for a converted model, whose architecture is settled; got "
            f"{', '.join(f'{name}={other[name]!r}' for name in unfit)}"
        )
    if num_classes not in (None, has := _classes(model)):
        if not hasattr(model, "reset_classifier"):
            raise UsageError(
                f"expected num_classes={has}, since the {type(model).__name__} in {str(folder)!r} has no "
                f"reset_classifier() to give it another head, got {num_classes}; put one in after loading"
            )
        model.reset_classifier(num_classes)  # type: ignore[operator]
    return model.train()  # as timm's entry points return it


def _classes(model: nn.Module) -> int | None:
    """As many as the model says, or else its last linear layer gives."""
    from torch import nn

    linear = [m.out_features for m in model.modules() if isinstance(m, nn.Linear)]
    return getattr(model, "num_classes", linear[-1] if linear else None)


def _fits(model: nn.Module, name: str, value: Any) -> bool:
    """Whether an argument asks for nothing that the model has not."""
    if name in ("cache_dir", "pretrained_cfg", "pretrained_cfg_overlay"):  # passed by timm.create_model itself
        return True
    if name == "in_chans":
        from timm.models import get_model_input_config

        return bool(get_model_input_config(model)["input_size"][0] == value)
    return name.startswith("drop") and not value


def when_timm_is_imported() -> None:
    """Register the entry point in timm now, or as soon as timm is imported."""
    if "timm" in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _AfterTimm())


def _register() -> None:
    from timm.models import is_model, register_model

    if not is_model(ilmconvert.__name__):
        register_model(ilmconvert)


class _AfterTimm:
    """Lets timm be found as ever, and registers the entry point once it is loaded, not when it is merely looked for.

    It has no base class: importlib.abc would double the time that ``import ilmconvert`` takes.
    """

    def __init__(self) -> None:
        self._looking = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec of timm, with the registration after its loading; None for everything else."""
        if fullname != "timm" or self._looking:
            return None
        from importlib.util import find_spec

        self._looking = True
        try:
            spec = find_spec(fullname)
        finally:
            self._looking = False
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                load(module)
                sys.meta_path.remove(self)
                _register()

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
