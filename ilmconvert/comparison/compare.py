"""The entrance: two models to a diff."""

from __future__ import annotations

from typing import Any

from torch import nn

from ilmconvert.comparison.align import align
from ilmconvert.comparison.reading import read_model
from ilmconvert.comparison.rows import merge
from ilmconvert.comparison.value import GraphDiff
from ilmconvert.errors import UsageError
from ilmconvert.graph.inputs import example_inputs as resolve_inputs

__all__ = ["diff"]


def diff(
    a: nn.Module,
    b: nn.Module,
    *,
    example_inputs: Any = None,
    names: tuple[str, str] | None = None,
) -> GraphDiff:
    """What changed from model ``a`` to model ``b``; both are left as they are.

    Args:
        a, b: any two modules. They are read in evaluation mode, on fake tensors.
        example_inputs: what to call both with, for shapes and counts: a tensor, a tuple, or a dict of keyword
            arguments. timm models declare their own, each for itself.
        names: what to call the models; None takes their classes.

    Raises:
        UsageError: something else than two modules.
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
    return GraphDiff(before, after, merge(align(before, after)))
