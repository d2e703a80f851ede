"""Functional norms in a model to convert: from the call to a module, to an ILM layer in the owner, and back."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ilmconvert.errors import PlanError
from ilmconvert.graph.calls import as_module, find_calls
from ilmconvert.graph.owner import redirect_, restore_
from ilmconvert.graph.shadow import shadow
from ilmconvert.graph.tracer import TraceError
from ilmconvert.norms import Refusal
from ilmconvert.plan import Decision, Plan

__all__ = ["call_as_module", "get_module", "put_calls_back_", "redirect_calls_"]


def get_module(model: nn.Module, path: str) -> nn.Module:
    """The module at ``path``.

    Raises:
        PlanError: there is none.
    """
    try:
        return model.get_submodule(path)
    except AttributeError as error:
        raise PlanError(f"expected a module at {path!r} of {type(model).__name__}, but: {error}") from error


def call_as_module(model: nn.Module, decision: Decision) -> nn.Module:
    """The torch module that computes what a functional norm does, with the model's own tensors in it.

    Raises:
        PlanError: the model's code makes no such call.
    """
    site, call = decision.site, decision.site.call
    owner = get_module(model, site.owner)
    assert call is not None
    copy = shadow(owner, FakeTensorMode(allow_non_fake_inputs=True))
    try:
        found = {f.call.name: f for f in find_calls(copy, _ranks(decision)).calls}.get(call.name)
    except TraceError as error:
        raise PlanError(f"expected to trace {site.owner!r} for its {site.class_name} call, but: {error}") from error
    if found is None or found.function != site.norm or found.refusal or hasattr(owner, call.child):
        raise PlanError(
            f"expected the forward of {site.owner!r} to call {site.norm} ({call.name}); the plan is for another model"
        )
    module = as_module(found, owner, None if site.spec is None else site.spec.num_channels)
    if isinstance(module, Refusal):
        raise PlanError(f"at {site.path!r}: {module.reason}")
    return module


def _ranks(decision: Decision) -> dict[str, int]:
    call = decision.site.call
    return {} if call is None or call.rank is None else {decision.site.norm: call.rank}


def redirect_calls_(model: nn.Module, plan: Plan, layers: Mapping[str, nn.Module]) -> None:
    """Put the layers of functional norms into their owners, whose forwards then call them.

    A tensor that only the calls used has moved into the layer; its old name stays, empty, so that the order of names
    survives an undo. Calls on the parameters of a norm module that became a layer run that layer.
    """
    for owner_path, children in _children(plan).items():
        owner = get_module(model, owner_path)
        decisions = [d for d in plan.converted if d.site.call is not None and d.site.owner == owner_path]
        for decision in decisions:
            owner.add_module(decision.site.layer_path.rpartition(".")[2], layers[decision.path])
        ranks = {function: rank for d in decisions for function, rank in _ranks(d).items()}
        try:
            used = redirect_(owner, children, ranks)
        except TraceError as error:
            raise PlanError(f"expected the forward of {owner_path!r} to be as planned, but: {error}") from error
        for decision in decisions:
            for path in decision.site.call.tensors.values() if decision.site.call else ():
                if path not in used:
                    _set(owner, path, None)


def _children(plan: Plan) -> dict[str, dict[str, str]]:
    """Owner to the names of its calls, each with the path of the module that takes its place."""
    children: dict[str, dict[str, str]] = {}
    for decision in plan.converted:
        site = decision.site
        if site.call is not None:
            children.setdefault(site.owner, {})[site.call.name] = site.call.child
        for reader in site.read_by:
            owner, _, name = reader.rpartition(":")
            below = next(p for p in site.paths if not owner or p.startswith(f"{owner}."))
            children.setdefault(owner, {})[name] = below[len(owner) :].lstrip(".")
    return children


def _set(owner: nn.Module, path: str, value: object) -> None:
    home, _, name = path.rpartition(".")
    module = owner.get_submodule(home)
    slots = module._parameters if name in module._parameters else module._buffers
    slots[name] = value  # type: ignore[assignment]


def put_calls_back_(model: nn.Module, plan: Plan, originals: Mapping[str, nn.Module]) -> None:
    """Undo :func:`redirect_calls_`: forwards, tensors under their old names, no layers."""
    for owner_path in _children(plan):
        restore_(get_module(model, owner_path))
    for decision in plan.converted:
        if (call := decision.site.call) is not None:
            owner = get_module(model, decision.site.owner)
            delattr(owner, call.child)
            for slot, path in call.tensors.items():
                _set(owner, path, getattr(originals[decision.path], slot))
