"""Where a model comes from: a timm name, ``package.module:factory``, or a saved folder; and how to build it again."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

from torch import nn

from ilmconvert.errors import IlmconvertError, UnknownModelError
from ilmconvert.quiet import quiet
from ilmconvert.wording import brief

__all__ = ["Source", "build", "is_factory"]

_HUB = ("hf-hub:", "hf_hub:", "local-dir:")


@dataclass(frozen=True)
class Source:
    """How the original model can be built.

    Attributes:
        kind: a timm architecture, or a factory of the user's.
        name: the architecture, or ``package.module:factory``.
        model_args: keyword arguments for it.
    """

    kind: Literal["timm", "factory"]
    name: str
    model_args: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module) -> Source | None:
        """The source that a model tells of itself: timm's models carry their architecture and arguments."""
        config = getattr(model, "pretrained_cfg", None)
        architecture = config.get("architecture") if isinstance(config, dict) else getattr(config, "architecture", None)
        if not architecture:
            return None
        from timm.models import get_model_args

        return cls("timm", architecture, get_model_args(model))


def build(name: str, *, pretrained: bool = False, model_args: dict[str, Any] | None = None) -> nn.Module:
    """Build the model that ``name`` means.

    Args:
        name: a timm architecture (``resnet50``, ``resnet50.a1_in1k``, ``hf-hub:...``, ``local-dir:...``) or
            ``package.module:factory`` (modules in the working directory are found too).
        pretrained: load timm's pretrained weights.
        model_args: keyword arguments of the architecture or factory.

    Raises:
        UnknownModelError: the name means nothing; the nearest timm names are given.
        IlmconvertError: the factory or timm failed.

    Example:
        >>> type(build("test_resnet")).__name__
        'ResNet'
    """
    args = model_args or {}
    if is_factory(name):
        if pretrained:
            raise UnknownModelError(f"expected a timm name with pretrained weights asked for, got the factory {name!r}")
        return _call(lambda: _factory(name)(**args), name)
    import timm

    if not name.startswith(_HUB) and not timm.is_model(name):
        raise UnknownModelError(_not_a_model(name))
    if pretrained:
        return _pretrained(name, args)
    return _call(lambda: timm.create_model(name, pretrained=False, **args), name)


def is_factory(name: str) -> bool:
    """Whether ``name`` is written as ``package.module:factory``."""
    return ":" in name and not name.startswith(_HUB)


def _call(make: Callable[[], Any], name: str) -> nn.Module:
    try:
        with contextlib.redirect_stdout(sys.stderr):  # what a factory prints must not come between our own output
            model = make()
    except IlmconvertError:
        raise
    except (Exception, SystemExit) as error:
        raise IlmconvertError(f"expected {name!r} to build a model, but it failed: {brief(error)}") from error
    if not isinstance(model, nn.Module):
        raise IlmconvertError(f"expected {name!r} to return a torch.nn.Module, got {type(model).__name__}")
    return model


def _pretrained(name: str, args: dict[str, Any]) -> nn.Module:
    import timm

    try:
        with quiet("huggingface_hub", "timm"):  # the retries are told once, in the error
            return timm.create_model(name, pretrained=True, **args)  # type: ignore[no-any-return]
    except Exception as error:
        raise IlmconvertError(
            f"could not load the pretrained weights of {name!r}: {brief(error).rstrip('.')}. Check the connection, or "
            "download the file yourself and give it as a checkpoint (--checkpoint FILE, or --teacher-checkpoint FILE)"
        ) from error


def _factory(name: str) -> Callable[..., Any]:
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute:
        raise UnknownModelError(f"expected package.module:factory, got {name!r}")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    try:
        found: Any = importlib.import_module(module_name)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise UnknownModelError(f"expected {name!r} to name a factory that can be imported, but: {error}") from error
    if not callable(found):
        raise UnknownModelError(f"expected {name!r} to be callable, got {type(found).__name__}")
    return cast("Callable[..., Any]", found)


def _not_a_model(name: str) -> str:
    import timm

    near = difflib.get_close_matches(name.partition(".")[0], timm.list_models(), n=3, cutoff=0.5)
    hint = f"; did you mean {', '.join(near)}?" if near else ""
    return f"expected a timm model, a folder saved by ilmconvert or package.module:factory, got {name!r}{hint}"
