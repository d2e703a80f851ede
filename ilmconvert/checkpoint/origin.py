"""Whether a model's name, or its factory, builds it as it is: only then is a folder loaded by that."""

from __future__ import annotations

import json
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ilmconvert.checkpoint.weights import check_keys
from ilmconvert.conversion import Conversion, size_of
from ilmconvert.errors import CheckpointError, IlmconvertError
from ilmconvert.nn import ILMNorm
from ilmconvert.norms import class_name
from ilmconvert.rewrite import rewrite
from ilmconvert.sources import Source, build
from ilmconvert.wording import some

__all__ = ["timm_config", "trusted_source"]


def trusted_source(conversion: Conversion) -> Source | None:
    """The model's own source, if it does rebuild the same modules and weights.

    Warns:
        UserWarning: it does not.
    """
    if conversion.source is not None and conversion.source.kind == "factory":
        if size_of(conversion.model) == conversion.parameters:  # the factory is not called again to know more
            return conversion.source
        warnings.warn(
            f"{conversion.source.name} built a model of another size, so load() will need model=...; or give a factory "
            "of this one to save()",
            stacklevel=3,
        )
        return None
    source = Source.of(conversion.model)  # as it is now: its head may have been reset since
    if source is None:
        return None
    try:
        json.dumps(source.model_args)
        with torch.device("meta"):
            rebuilt, _ = rewrite(build(source.name, model_args=source.model_args), conversion.plan)
        check_keys(rebuilt.state_dict(), conversion.model.state_dict(), source.name)
        _check_modules(rebuilt, conversion.model)
        timm_config(conversion.model)
    except (IlmconvertError, TypeError, ValueError, AttributeError) as error:
        warnings.warn(
            f"{source.name} does not rebuild this model, so load() will need model=...: {error}", stacklevel=3
        )
        return None
    return source


def _check_modules(rebuilt: nn.Module, model: nn.Module) -> None:
    """Raise unless all modules are of one class and tell the same of themselves: strides, paddings and their like."""
    wanted, found = (
        {path: f"{class_name(type(m))}({_arguments(m)})" for path, m in each.named_modules() if not _passes_on(m)}
        for each in (rebuilt, model)
    )
    differing = [
        f"{path!r} is {found.get(path, 'nothing')} instead of {wanted.get(path, 'nothing')}"
        for path in {**wanted, **found}
        if wanted.get(path) != found.get(path)
    ]
    if differing:
        raise CheckpointError(some(differing, 1))


def _passes_on(module: nn.Module) -> bool:
    """Whether evaluation goes through it unchanged; timm keeps no rates of dropouts for its config either."""
    return isinstance(module, nn.Identity) or "drop" in type(module).__name__.lower()


def _arguments(module: nn.Module) -> str:
    """What a module tells of itself; an ILM layer's activation and dropout are modules of their own."""
    return ILMNorm.extra_repr(module) if isinstance(module, ILMNorm) else module.extra_repr()


def timm_config(model: nn.Module) -> dict[str, Any]:
    """The config.json that timm itself would write."""
    from timm.models._hub import save_config_for_hf

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.json"
        save_config_for_hf(model, str(file))
        return json.loads(file.read_text(encoding="utf-8"))  # type: ignore[no-any-return]
