"""Parameter groups for any torch optimizer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal

from torch import nn

from ilmconvert.errors import UsageError
from ilmconvert.graph.inputs import check_model
from ilmconvert.nn import ILMNorm
from ilmconvert.norms import find

__all__ = ["META_LR_SCALE", "parameter_groups"]

META_LR_SCALE = 0.1  # measured in benchmarks/digits.py

Kind = Literal["meta", "norm", "rest"]
_AFFINE = tuple(f"{home}{name}" for home in ("", "parametrizations.") for name in ("weight", "bias"))


def parameter_groups(
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float = 0.0,
    meta_lr_scale: float = META_LR_SCALE,
    freeze: bool | str | Sequence[str] = False,
) -> list[dict[str, Any]]:
    """The trainable parameters of a model, each exactly once, in groups for any torch optimizer.

    ========  =======================================================================  ==================  ============
    name      parameters                                                               learning rate       weight decay
    ========  =======================================================================  ==================  ============
    ``meta``  of ILM layers: encoder, decoders and gains                               lr * meta_lr_scale  0
    ``norm``  scale and shift of every norm, converted or not; all biases and other    lr                  0
              vectors, and what ``no_weight_decay()`` of the model, or of a module in
              it, names
    ``rest``  everything else                                                          lr                  weight_decay
    ========  =======================================================================  ==================  ============

    Decay would pull a converted layer's scale towards zero, and the meta parameters towards a predictor that says
    nothing. Empty groups are left out; the model is not changed.

    Args:
        model: any model, converted or not, wrapped (DDP, FSDP, ``torch.compile``) or not.
        lr: learning rate.
        weight_decay: of the group ``rest``.
        meta_lr_scale: learning rate of the meta parameters, relative to ``lr``. A predictor serves all channels of its
            groups, so its gradients add up over them: with the learning rate of the rest it runs away.
        freeze: what to leave out: True for everything but the ILM layers, or shell patterns of parameter names. Such
            parameters stay as they are, whatever their ``requires_grad``.

    Returns:
        Dicts with ``name``, ``params``, ``lr`` and ``weight_decay``; further groups can stand beside them. A parameter
        with several names (tied weights) is in the first group that any of them belongs to.

    Raises:
        UsageError: no model, a pattern that matches nothing, a negative number, or nothing left to train.

    Example:
        >>> import ilmconvert, timm, torch
        >>> model = ilmconvert.convert(timm.create_model("test_vit")).model
        >>> groups = ilmconvert.parameter_groups(model, lr=1e-3, weight_decay=0.05, meta_lr_scale=0.5)
        >>> [(group["name"], group["lr"], group["weight_decay"], len(group["params"])) for group in groups]
        [('meta', 0.0005, 0.0, 39), ('norm', 0.001, 0.0, 54), ('rest', 0.001, 0.05, 26)]
        >>> optimizer = torch.optim.AdamW(groups)
    """
    check_model(model)
    for name, value in (("lr", lr), ("weight_decay", weight_decay), ("meta_lr_scale", meta_lr_scale)):
        if not value >= 0:
            raise UsageError(f"expected {name} of at least 0, got {value!r}")
    kinds = _kinds(model)
    frozen = _frozen(model, freeze)
    settings = {"meta": (lr * meta_lr_scale, 0.0), "norm": (lr, 0.0), "rest": (lr, weight_decay)}
    trained = [p for p in model.parameters() if p.requires_grad and p not in frozen]
    groups = []
    for kind, (rate, decay) in settings.items():
        if members := [p for p in trained if kinds[p] == kind]:
            groups.append({"name": kind, "params": members, "lr": rate, "weight_decay": decay})
    if not groups:
        raise UsageError("expected parameters to train, but all are frozen; set requires_grad, or freeze less")
    return groups


def _kinds(model: nn.Module) -> dict[nn.Parameter, Kind]:
    """The kind of every parameter; of several, the first in the order meta, norm, rest."""
    kinds: dict[nn.Parameter, Kind] = {}
    for module in model.modules():
        if isinstance(module, ILMNorm):
            kinds.update((p, "meta") for name, p in _own(module) if not name.startswith(_AFFINE))
    for module in model.modules():
        if isinstance(module, ILMNorm) or find(module) is not None:
            computed = [p for name, p in module.named_parameters() if name.startswith("parametrizations.")]
            for parameter in (*module.parameters(recurse=False), *computed):
                kinds.setdefault(parameter, "norm")
    undecayed = {parameter for module in model.modules() for parameter in _undecayed(module)}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.ndim <= 1 or name.rpartition(".")[2].endswith("bias") or parameter in undecayed:
            kinds.setdefault(parameter, "norm")
    for parameter in model.parameters():
        kinds.setdefault(parameter, "rest")
    return kinds


def _undecayed(module: nn.Module) -> list[nn.Parameter]:
    """What the module's ``no_weight_decay()`` names: timm's models name their embeddings so."""
    wanted = getattr(module, "no_weight_decay", None)
    names = wanted() if callable(wanted) else ()
    return [p for name, p in module.named_parameters(remove_duplicate=False) if name in names] if names else []


def _own(layer: ILMNorm) -> Iterator[tuple[str, nn.Parameter]]:
    """The layer's parameters without those of a fused activation."""
    return ((n, p) for n, p in layer.named_parameters() if not n.startswith(("act.", "drop.")))


def _frozen(model: nn.Module, freeze: bool | str | Sequence[str]) -> set[nn.Parameter]:
    if freeze is True:
        layers = [m for m in model.modules() if isinstance(m, ILMNorm)]
        return set(model.parameters()) - {p for layer in layers for _, p in _own(layer)}
    patterns = [freeze] if isinstance(freeze, str) else list(freeze or ())
    names = list(model.named_parameters(remove_duplicate=False))
    if lost := [pattern for pattern in patterns if not any(fnmatchcase(name, pattern) for name, _ in names)]:
        raise UsageError(f"expected the pattern {lost[0]!r} to match the name of a parameter; it matches none")
    return {p for name, p in names if any(fnmatchcase(name, pattern) for pattern in patterns)}
