"""A second opinion on where norms are, which shares no code and no table with the search.

It knows torch's norm classes, and for the rest goes by names: a class that calls itself a norm (itself or by what it
inherits from) and holds no weight matrix.
"""

from __future__ import annotations

import re

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

__all__ = ["norm_like"]

_KNOWN = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, nn.LocalResponseNorm, nn.CrossMapLRN2d)
_NAME = re.compile(r"norm|(?<![a-z])bn(?![a-z])|frn|grn|abn|^affine$|rms", re.IGNORECASE)
_MATRICES = (nn.Linear, nn.modules.conv._ConvNd, nn.Embedding, nn.Bilinear)


def norm_like(model: nn.Module) -> dict[str, str]:
    """Every module that looks like a norm, under each of its paths, with the name of its class.

    Of nested ones (a wrapper called a norm around a norm) the innermost counts.

    Example:
        >>> norm_like(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)))
        {'1': 'LayerNorm'}
    """
    found = {name: m for name, m in model.named_modules(remove_duplicate=False) if _looks(m)}
    inner = {id(m) for outer in set(found.values()) for m in outer.modules() if m is not outer and _looks(m)}
    around = {id(m) for m in found.values() if any(id(c) in inner for c in m.modules() if c is not m)}
    return {name: type(m).__name__ for name, m in found.items() if id(m) not in around}


def _looks(module: nn.Module) -> bool:
    if isinstance(module, _KNOWN):
        return True
    if isinstance(module, _MATRICES) or type(module).__module__.startswith("torch.nn.utils."):
        return False
    names = [c.__name__ for c in type(module).__mro__ if c.__module__.partition(".")[0] != "torch"]
    if not any(_NAME.search(name) for name in names):
        return False
    parts = [m for m in module.modules() if m is not module]
    return not any(isinstance(m, _MATRICES) or any(p.ndim > 1 for p in m.parameters(recurse=False)) for m in parts)
