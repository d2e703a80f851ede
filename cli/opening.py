"""From a MODEL argument to a model."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ilmconvert.errors import UsageError
from ilmconvert.wording import one_line

if TYPE_CHECKING:
    from torch import nn

    from ilmconvert import Conversion

__all__ = ["Opened", "Pair", "open_model", "open_pair", "open_teacher", "original_norms", "sample_inputs"]


class Opened(NamedTuple):
    """A model, and the factory that builds it where it is not timm's."""

    model: nn.Module
    factory: str | None
    model_args: dict[str, Any]


class Pair(NamedTuple):
    """Two models to compare, and what to call them."""

    a: nn.Module
    b: nn.Module
    names: tuple[str, str]


def open_model(
    name: str,
    *,
    pretrained: bool = False,
    checkpoint: Path | None = None,
    model_args: tuple[tuple[str, Any], ...] = (),
    trust_factory: bool = False,
) -> Opened:
    """Build the original model that a MODEL argument means.

    Args:
        name: a timm name, a saved folder (which stands for its original norms), or ``package.module:factory``.
        pretrained, checkpoint, model_args: as the options say.
        trust_factory: call the factory that a saved folder names.
    """
    from ilmconvert.checkpoint import is_saved, load_conversion, load_weights
    from ilmconvert.sources import build, is_factory

    if pretrained and checkpoint is not None:
        raise UsageError("expected --pretrained or --checkpoint, got both: either gives all weights")
    if is_saved(name):
        if pretrained or model_args:
            raise UsageError(
                f"{name!r} is a saved conversion with weights of its own; leave out --pretrained and --model-arg"
            )
        conversion = load_conversion(name, trust_factory=trust_factory)
        source = conversion.source
        factory = source.name if source is not None and source.kind == "factory" else None
        opened = Opened(original_norms(conversion), factory, source.model_args if source and factory else {})
    else:
        args = dict(model_args)
        model = build(name, pretrained=pretrained, model_args=args)
        opened = Opened(model, name if is_factory(name) else None, args)
    if checkpoint is not None:
        load_weights(opened.model, checkpoint)
    return opened


def original_norms(conversion: Conversion) -> nn.Module:
    """The model with its original norms back, and a warning where that is not the original."""
    if not conversion.has_original:
        warnings.warn(
            f"other weights of this {conversion.plan.model} than those of its ILM layers are not known to be the "
            "original's (they were trained, say): with the original norms back, it is not the original",
            stacklevel=2,
        )
    return conversion.revert()


def open_pair(
    a: str,
    b: str | None,
    *,
    pretrained: bool = False,
    model_args: tuple[tuple[str, Any], ...] = (),
    trust_factory: bool = False,
    values: bool = False,
) -> Pair:
    """The two models that the arguments of ``diff`` mean; a saved conversion is what was converted.

    Args:
        a, b: timm names, saved folders or ``package.module:factory``; without ``b``, ``a`` is a saved folder, whose
            original norms are compared with it.
        pretrained, model_args, trust_factory: as :func:`open_model`, for those that are no saved folders.
        values: what they compute is compared too.
    """
    from ilmconvert.checkpoint import is_saved, load_conversion
    from ilmconvert.sources import is_factory

    if b is None:
        if not is_saved(a):
            raise UsageError(
                f"expected two models, or one folder saved by ilmconvert; got {a!r} alone, and no such folder"
            )
        conversion = load_conversion(a, trust_factory=trust_factory)
        title = "original" if conversion.has_original else "its original norms"
        return Pair(original_norms(conversion), conversion.model, (f"{a} ({title})", a))

    fresh = [name for name in (a, b) if not is_saved(name) and not is_factory(name)]
    if values and len(fresh) == 1 and not pretrained:
        warnings.warn(f"{fresh[0]} has random weights without --pretrained, so its values tell little", stacklevel=2)

    def opened(name: str) -> nn.Module:
        import torch

        if is_saved(name):
            return load_conversion(name, trust_factory=trust_factory).model
        torch.manual_seed(0)  # the same random weights for the same architecture
        return open_model(name, pretrained=pretrained, model_args=model_args).model

    return Pair(opened(a), opened(b), (a, b))


def open_teacher(conversion: Conversion, name: str | None, checkpoint: Path | None, trust_factory: bool) -> nn.Module:
    """The original that a conversion is compared with: its own, or the model that the options name."""
    from ilmconvert.checkpoint import is_saved, load_conversion
    from ilmconvert.sources import is_factory

    if name is None:
        if checkpoint is not None:
            raise UsageError("expected --teacher with --teacher-checkpoint: the model that the weights are for")
        return conversion.original()
    if is_saved(name) and checkpoint is None:
        return load_conversion(name, trust_factory=trust_factory).original()
    pretrained = checkpoint is None and not is_factory(name)
    return open_model(name, pretrained=pretrained, checkpoint=checkpoint, trust_factory=trust_factory).model


def sample_inputs(model: nn.Module, input_size: tuple[int, ...] | None) -> Any:
    """Random inputs of the size asked for, or of the size the model declares."""
    from ilmconvert.graph import example_inputs

    try:
        return example_inputs(model, input_size=input_size)
    except (RuntimeError, TypeError) as error:
        raise UsageError(
            f"expected an input size that memory holds, got {input_size}: {one_line(error, 120)}"
        ) from error
