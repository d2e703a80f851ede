"""The entrance: two models to a diff."""

from __future__ import annotations

from typing import Any

from torch import nn

from ilmconvert.comparison.align import align
from ilmconvert.comparison.batches import given_batches
from ilmconvert.comparison.numerics import measure
from ilmconvert.comparison.reading import read_model
from ilmconvert.comparison.rows import merge
from ilmconvert.comparison.value import GraphDiff
from ilmconvert.errors import UsageError
from ilmconvert.graph.inputs import example_inputs as resolve_inputs
from ilmconvert.options import Progress

__all__ = ["diff"]


def diff(
    a: nn.Module,
    b: nn.Module,
    *,
    example_inputs: Any = None,
    numerics: Any = None,
    progress: Progress | None = None,
    names: tuple[str, str] | None = None,
) -> GraphDiff:
    """What changed from model ``a`` to model ``b``; both are left as they are.

    Args:
        a, b: any two modules. They are read in evaluation mode, on fake tensors.
        example_inputs: what to call both with, for shapes and counts: a tensor, a tuple, or a dict of keyword
            arguments. timm models declare their own, each for itself.
        numerics: also run both, and tell how far the outputs of matched modules are apart, on ``"random"`` inputs, the
            images of a folder, or an iterable of batches (each a tensor, a tuple or a dict).
        progress: called with (what, done, total).
        names: what to call the models; None takes their classes.

    Raises:
        UsageError: something else than two modules.
        IlmconvertError: the models cannot be run on the inputs for ``numerics``.
        ModelError: a lazy or scripted model, or one that cannot be copied.

    Example:
        >>> import ilmconvert
        >>> from torch import nn
        >>> a = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8))
        >>> b = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.LayerNorm(8))
        >>> for row in ilmconvert.diff(a, b).changed:
        ...     print(row.before, row.after, row.changes)
        None 1 ('inserted',)
        1 2 ('renamed',)
    """
    for model in (a, b):
        if not isinstance(model, nn.Module):
            raise UsageError(f"expected two torch.nn.Modules, got {model!r}; build it first (timm.create_model(name))")
    named = zip((a, b), names or (None, None), strict=True)
    before, after = (read_model(m, resolve_inputs(m, example_inputs, batch_size=1), name=name) for m, name in named)
    result = GraphDiff(before, after, merge(align(before, after)))
    return result if numerics is None else measure(result, a, b, given_batches(numerics, a), progress=progress)
