"""Other converters on the same randomly chosen timm architectures: what they convert, miss, lose and keep.

``python -m benchmarks.peers`` (needs ``pip install 'ilmconvert[peers]'``). Models are built on the meta device;
their norms get real, random values, so that what becomes of scale and shift can be compared.
"""

from __future__ import annotations

import argparse
import copy
import random
import warnings
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import timm
import torch
from opacus.validators import ModuleValidator
from torch import nn

import ilmconvert
from benchmarks.common import write
from ilmconvert.norms import Entry, find
from ilmconvert.survey.walk import norm_like

TOOLS: dict[str, Callable[[nn.Module], tuple[nn.Module, set[str]]]] = {
    # the converted model, and the paths that the tool itself says it leaves
    "ilmconvert": lambda model: _ours(model),
    "opacus ModuleValidator.fix": lambda model: (ModuleValidator.fix(model), _opacus_complaints(model)),
    "timm convert_sync_batchnorm": lambda model: (timm.layers.convert_sync_batchnorm(copy.deepcopy(model)), set()),
    "torch convert_sync_batchnorm": lambda model: (
        nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model)),
        set(),
    ),
}


def _ours(model: nn.Module) -> tuple[nn.Module, set[str]]:
    conversion = ilmconvert.convert(model)
    return conversion.model, {path for d in conversion.report.skipped for path in d.site.paths}


def _opacus_complaints(model: nn.Module) -> set[str]:
    """opacus names no paths; whether it still finds the fixed model invalid counts for all of them."""
    return set() if ModuleValidator.is_valid(ModuleValidator.fix(model)) else set(norm_like(model))


def build(name: str) -> nn.Module:
    with torch.device("meta"):
        model: nn.Module = timm.create_model(name)
    for path in norm_like(model):
        norm = model.get_submodule(path)
        for store in (norm._parameters, norm._buffers):
            for key, tensor in store.items():
                if tensor is not None and tensor.is_meta:
                    value = torch.rand(tensor.shape) + 0.5 if tensor.is_floating_point() else torch.zeros(tensor.shape)
                    real = value.to(tensor.dtype)
                    store[key] = nn.Parameter(real) if isinstance(tensor, nn.Parameter) else real
    return model


def is_batch_norm(norm: nn.Module) -> bool:
    entry = find(norm)
    return isinstance(entry, Entry) and entry.handler.family == "batch"


def activation(norm: nn.Module) -> nn.Module | None:
    act = getattr(norm, "act", None)
    return None if isinstance(act, nn.Identity) else act


def loses_activation(norm: nn.Module, layer: nn.Module) -> bool:
    """Whether a norm's own activation no longer runs: a module of that name may be there and never be called."""
    if activation(norm) is None:
        return False
    act, calls = activation(layer), []
    if act is None:
        return True
    handle = act.register_forward_hook(lambda *_: calls.append(1))
    width = next(iter(norm.parameters(recurse=False))).numel()
    try:
        layer.eval()(torch.rand(2, width, 4, 4) if "1d" not in type(norm).__name__ else torch.rand(2, width, 4))
    finally:
        handle.remove()
    return not calls


def measure(name: str, tool: str) -> dict[str, Any]:
    """What one tool makes of one model."""
    model = build(name)
    norms = {path: model.get_submodule(path) for path in norm_like(model)}
    row: dict[str, Any] = {"norms": len(norms), "batch_norms": sum(map(is_batch_norm, norms.values()))}
    try:
        converted, told = TOOLS[tool](model)
    except Exception as error:  # a peer that fails is a result
        return {**row, "error": f"{type(error).__name__}: {str(error)[:200]}"}
    after = dict(converted.named_modules(remove_duplicate=False))
    replaced = {p: after[p] for p, norm in norms.items() if p in after and type(after[p]) is not type(norm)}
    left = [p for p in norms if p not in replaced]
    return row | {
        "converted": len(replaced),
        "batch_norms_missed_silently": sum(is_batch_norm(norms[p]) for p in left if p not in told),
        "left_without_a_word": sum(p not in told for p in left),
        "activations_lost": sum(loses_activation(norms[p], m) for p, m in replaced.items()),
        "scale_or_shift_lost": sum(not _keeps_affine(norms[p], m) for p, m in replaced.items()),
    }


def _keeps_affine(norm: nn.Module, layer: nn.Module) -> bool:
    """Whether scale and shift come from the norm's: the same values, or (Batch Norm here) its effective ones."""
    entry = find(norm)
    for wanted in ("weight", "bias"):
        before, after = getattr(norm, wanted, None), getattr(layer, wanted, None)
        if before is None:
            continue
        if after is None or after.is_meta:
            return False
        if torch.equal(before.flatten(), after.flatten()):
            continue
        groups = getattr(layer, "num_groups", None)
        if not isinstance(entry, Entry) or groups is None:
            return False
        derived = entry.handler.affine(norm, groups)[wanted == "bias"]
        if derived is None or not torch.allclose(derived.float().flatten(), after.float().flatten(), atol=1e-5):
            return False
    return True


def totals(rows: list[dict[str, Any]]) -> dict[str, Any]:
    keys = [k for k in rows[0] if k not in ("model", "tool")] if rows else []
    done = [r for r in rows if "error" not in r]
    return {k: sum(r[k] for r in done) for k in keys if k != "error"} | {"failed": len(rows) - len(done)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    names = sorted(random.Random(arguments.seed).sample(timm.list_models(), arguments.models))
    rows = [{"model": name, "tool": tool, **measure(name, tool)} for name in names for tool in TOOLS]
    sums = [{"tool": tool, **totals([r for r in rows if r["tool"] == tool])} for tool in TOOLS]
    drawn = f"{arguments.models} architectures drawn with seed {arguments.seed}"
    write("peers", sums, measure=drawn, packages={"opacus": version("opacus")}, models=rows)
