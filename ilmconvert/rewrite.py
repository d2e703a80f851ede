"""Carry out a plan on a copy of a model, and take it back."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from ilmconvert.errors import PlanError
from ilmconvert.graph.inputs import first_tensor
from ilmconvert.graph.shadow import copy_model
from ilmconvert.norms import Entry, build_ilm, class_name, find
from ilmconvert.plan import Decision, Plan

__all__ = ["get_module", "replace_modules_", "rewrite"]


def rewrite(
    model: nn.Module, plan: Plan, *, on_site: Callable[[Decision], None] | None = None
) -> tuple[nn.Module, dict[str, nn.Module]]:
    """Convert a copy of ``model`` as ``plan`` says.

    Args:
        model: the model the plan was made for, or one built alike; it is left as it is.
        plan: the decisions.
        on_site: called after each conversion.

    Returns:
        The converted copy, and the norms it lost by canonical path.

    Raises:
        PlanError: a path is missing, holds another class or another norm than the plan says, or a number of groups
            does not divide its channels.
    """
    copy = copy_model(model)
    fallback = first_tensor(copy)
    originals = {decision.path: _checked(copy, decision) for decision in plan.converted}
    replacements: dict[str, nn.Module] = {}
    for decision in plan.converted:
        replacement = _replacement(originals[decision.path], decision, fallback)
        replacements.update(dict.fromkeys(decision.site.paths, replacement))
        if on_site is not None:
            on_site(decision)
    return replace_modules_(copy, replacements), originals


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


def get_module(model: nn.Module, path: str) -> nn.Module:
    """The module at ``path``.

    Raises:
        PlanError: there is none.
    """
    try:
        return model.get_submodule(path)
    except AttributeError as error:
        raise PlanError(f"expected a module at {path!r} of {type(model).__name__}, but: {error}") from error


def replace_modules_(model: nn.Module, replacements: dict[str, nn.Module]) -> nn.Module:
    """Put modules in place, at every given path; returns the model, or the replacement of the root itself."""
    if "" in replacements:
        return replacements[""]
    for path, replacement in replacements.items():
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, replacement)
    return model
