"""Carry out a plan on a model or a copy of it."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import is_dataclass
from functools import partial
from types import MethodType, SimpleNamespace
from typing import Any

from torch import Tensor, nn

from ilmconvert.errors import PlanError
from ilmconvert.folding import refuse_folding_
from ilmconvert.graph.inputs import first_tensor
from ilmconvert.graph.shadow import copied_together, copy_model
from ilmconvert.graph.sites import norm_paths
from ilmconvert.nn import ILMNorm
from ilmconvert.norms import Entry, build_ilm, class_name, find
from ilmconvert.plan import Decision, Plan
from ilmconvert.redirection import calls_as_modules, get_module, redirect_calls_

__all__ = ["replace_modules_", "rewrite"]

_TORCHS_OWN = frozenset(vars(nn.Module()))


def rewrite(
    model: nn.Module, plan: Plan, *, in_place: bool = False, on_site: Callable[[Decision], None] | None = None
) -> tuple[nn.Module, dict[str, nn.Module]]:
    """Convert ``model`` as ``plan`` says.

    Args:
        model: the model the plan was made for, or one built alike.
        plan: the decisions.
        in_place: convert the model itself; otherwise a copy, and the model is left as it is.
        on_site: called after each conversion.

    Returns:
        The converted model, and (copies of) the norms it lost by canonical path.

    Raises:
        PlanError: a path is missing, holds another class or another norm than the plan says, or a number of groups
            does not divide its channels.
    """
    result = model if in_place else copy_model(model)
    _check_complete(result, plan)
    fallback = first_tensor(result)
    called = calls_as_modules(result, plan)
    norms = {d.path: called[d.path] if d.site.call else _checked(result, d) for d in plan.converted}
    originals = dict(zip(norms, copied_together(norms.values()), strict=True))
    layers: dict[str, nn.Module] = {}
    for decision in plan.converted:
        layers[decision.path] = _replacement(norms[decision.path], decision, fallback)
        if on_site is not None:
            on_site(decision)
    modules = {path: layers[d.path] for d in plan.converted if d.site.call is None for path in d.site.paths}
    redirect_calls_(result, plan, layers)
    return replace_modules_(result, modules), originals


def _check_complete(model: nn.Module, plan: Plan) -> None:
    """A norm that the plan says nothing of must not be passed over."""
    planned = {path for decision in plan.decisions for path in decision.site.paths}
    if missing := [paths[0] for paths in norm_paths(model).values() if not planned & set(paths)]:
        raise PlanError(
            f"expected a decision for every norm, but the plan has none for {', '.join(missing[:3])}; make the plan "
            "anew, or skip the norm in it"
        )


def _checked(model: nn.Module, decision: Decision) -> nn.Module:
    """The norm at the decision's paths, if it is the one the plan was made for."""
    modules = [get_module(model, path) for path in decision.site.paths]
    found = class_name(type(modules[0]))
    if found != decision.site.norm:
        raise PlanError(
            f"expected {decision.site.norm} at {decision.path!r}, got {found}; the plan is for another model"
        )
    if any(module is not modules[0] for module in modules):
        raise PlanError(f"expected one module shared by {', '.join(decision.site.paths)}; they are not tied here")
    return modules[0]


def _replacement(module: nn.Module, decision: Decision, fallback: Tensor | None) -> nn.Module:
    entry, target = find(module), decision.target
    if not isinstance(entry, Entry) or target is None:
        raise PlanError(f"expected a convertible norm and a target at {decision.path!r}; make the plan anew")
    spec = entry.handler.describe(module)
    if spec != decision.site.spec:
        raise PlanError(
            f"expected {decision.site.spec} at {decision.path!r}, got {spec}; the plan is for another model"
        )
    try:
        return build_ilm(module, entry.handler, target, like=fallback)
    except ValueError as error:
        raise PlanError(f"at {decision.path!r}: {error}") from error


def replace_modules_(model: nn.Module, replacements: dict[str, nn.Module]) -> nn.Module:
    """Put modules in place, at every given path; returns the model, or the replacement of the root itself."""
    if "" in replacements:  # a norm itself
        return replacements[""]
    instead: dict[nn.Module, nn.Module] = {}
    for path, replacement in replacements.items():
        parent, _, name = path.rpartition(".")
        owner = model.get_submodule(parent)
        instead[getattr(owner, name)] = replacement
        setattr(owner, name, replacement)
    for module in model.modules():  # a norm may be kept a second time where torch does not look: in a plain list
        for name, value in vars(module).items():
            if name not in _TORCHS_OWN:
                vars(module)[name] = _replaced(value, instead)
    _set_fused_paths_(model)
    refuse_folding_(model)
    return model


def _replaced(value: Any, instead: Mapping[nn.Module, nn.Module], depth: int = 3) -> Any:
    """A module's stand-in, and containers with theirs: themselves if they can be changed, or else rebuilt."""
    if isinstance(value, nn.Module):
        return instead.get(value, value)
    if isinstance(value, MethodType) and isinstance(value.__self__, nn.Module) and value.__self__ in instead:
        return getattr(instead[value.__self__], value.__name__, value)
    if isinstance(value, partial):
        parts = value.func, value.args, value.keywords
        function, args, keywords = new = _replaced(parts, instead)
        return value if new is parts else partial(function, *args, **keywords)
    if is_dataclass(value) or isinstance(value, SimpleNamespace):
        _replaced(getattr(value, "__dict__", None), instead, depth)
        return value
    if not depth or not isinstance(value, (list, tuple, dict, set, deque)):
        return value
    if isinstance(value, dict):
        changed = {k: new for k, old in value.items() if (new := _replaced(old, instead, depth - 1)) is not old}
        if changed:
            value.update(changed)
        return value
    new = [_replaced(item, instead, depth - 1) for item in value]
    if all(a is b for a, b in zip(new, value, strict=True)):
        return value
    if isinstance(value, (list, deque, set)):
        value.clear()
        (value.update if isinstance(value, set) else value.extend)(new)
        return value
    return value._make(new) if hasattr(value, "_make") else type(value)(new)


def _set_fused_paths_(model: nn.Module) -> None:
    """``nn.TransformerEncoderLayer`` has a kernel that reads its norms' weights instead of calling them: off with ILM.

    The attribute is torch's own: 1 or 2 for the activation that the kernel knows, 0 for none, which it does not take.
    An encoder makes nested tensors for that kernel, which nothing else can read; torch's constructor knows when.
    """
    for layer in model.modules():
        if isinstance(layer, nn.TransformerEncoderLayer):
            converted = any(isinstance(norm, ILMNorm) for norm in (layer.norm1, layer.norm2))
            kinds = (1, (nn.functional.relu, nn.ReLU)), (2, (nn.functional.gelu, nn.GELU))
            known = [n for n, (call, kind) in kinds if layer.activation is call or isinstance(layer.activation, kind)]
            layer.activation_relu_or_gelu = 0 if converted or not known else known[0]
    for encoder in model.modules():
        if isinstance(encoder, nn.TransformerEncoder) and getattr(encoder, "enable_nested_tensor", False):
            encoder.use_nested_tensor = all(map(_takes_nested, encoder.layers))


def _takes_nested(layer: nn.Module) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the reason why not
        try:
            return nn.TransformerEncoder(layer, 0).use_nested_tensor  # type: ignore[arg-type]
        except AttributeError:  # an attention of the user's own, which torch's kernel does not know either
            return False
