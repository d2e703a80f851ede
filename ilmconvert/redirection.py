"""Functional norms in a model to convert: from the call to a module, to an ILM layer in the owner, and back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn

from ilmconvert.errors import PlanError
from ilmconvert.graph.calls import FoundCall, as_module, find_calls
from ilmconvert.graph.mentions import read_attributes
from ilmconvert.graph.owner import redirected, restore_
from ilmconvert.graph.shadow import shadow
from ilmconvert.graph.tracer import TraceError
from ilmconvert.norms import Refusal
from ilmconvert.plan import Decision, Plan

__all__ = ["calls_as_modules", "get_module", "put_calls_back_", "redirect_calls_"]


def get_module(model: nn.Module, path: str) -> nn.Module:
    """The module at ``path``.

    Raises:
        PlanError: there is none.
    """
    try:
        return model.get_submodule(path)
    except AttributeError as error:
        raise PlanError(f"expected a module at {path!r} of {type(model).__name__}, but: {error}") from error


def calls_as_modules(model: nn.Module, plan: Plan) -> dict[str, nn.Module]:
    """By path, the torch modules that compute what functional norms do, with the model's own tensors in them.

    Raises:
        PlanError: the model's code makes no such call.
    """
    modules = {}
    for owner_path, decisions in _of_owners(plan).items():
        owner = get_module(model, owner_path)
        copy = shadow(owner)
        try:
            found = {f.call.name: f for f in find_calls(copy, _ranks(decisions)).calls}
        except TraceError as error:
            name = decisions[0].site.class_name
            raise PlanError(f"expected to trace {owner_path!r} for its {name} call, but: {error}") from error
        for decision in decisions:
            modules[decision.path] = _as_module(owner, decision, found)
    return modules


def _of_owners(plan: Plan) -> dict[str, list[Decision]]:
    """The functional norms to convert, by the path of their owner."""
    decisions: dict[str, list[Decision]] = {}
    for decision in plan.converted:
        if decision.site.call is not None:
            decisions.setdefault(decision.site.owner, []).append(decision)
    return decisions


def _as_module(owner: nn.Module, decision: Decision, calls: Mapping[str, FoundCall]) -> nn.Module:
    site, call = decision.site, decision.site.call
    assert call is not None
    found = calls.get(call.name)
    if found is None or found.function != site.norm or found.refusal or hasattr(owner, call.child):
        raise PlanError(
            f"expected the forward of {site.owner!r} to call {site.norm} ({call.name}); the plan is for another model"
        )
    module = as_module(found, owner, None if site.spec is None else site.spec.num_channels)
    if isinstance(module, Refusal):
        raise PlanError(f"at {site.path!r}: {module.reason}")
    return module


def _ranks(decisions: Iterable[Decision]) -> dict[str, int]:
    return {d.site.norm: d.site.call.rank for d in decisions if d.site.call and d.site.call.rank is not None}


def redirect_calls_(model: nn.Module, plan: Plan, layers: Mapping[str, nn.Module]) -> None:
    """Put the layers of functional norms into their owners, whose forwards then call them.

    A tensor that only the calls used has moved into the layer; its old name stays, empty, so that the order of names
    survives an undo. One that other code reads stays there too. Calls on the parameters of a norm module that became a
    layer run that layer.

    Raises:
        PlanError: an owner is not as planned; nothing is changed then.
    """
    children_of = _children(plan)
    owned, readers = _of_owners(plan), _readers(model) if children_of else {}
    made = {}
    for owner_path, children in children_of.items():
        owner = get_module(model, owner_path)
        try:
            made[owner_path] = redirected(owner, children, _ranks(owned.get(owner_path, [])))
        except TraceError as error:
            raise PlanError(f"expected the forward of {owner_path!r} to be as planned, but: {error}") from error
    for owner_path, (cls, used) in made.items():
        owner = get_module(model, owner_path)
        owner.__class__ = cls
        for decision in owned.get(owner_path, []):
            owner.add_module(decision.site.layer_path.rpartition(".")[2], layers[decision.path])
            for path in decision.site.call.tensors.values() if decision.site.call else ():
                if path not in used and not _read_by_others(owner, path, readers):
                    _set(owner, path, None)


_Readers = dict[tuple[nn.Module | None, str], list[nn.Module]]


def _readers(model: nn.Module) -> _Readers:
    """By module and attribute, the modules whose code takes it from outside; by None where the code hides of which."""
    readers: _Readers = {}
    for module in model.modules():
        for child, name in read_attributes(module):
            if child == "*" or module._modules.get(child) is not None:
                readers.setdefault((module._modules.get(child), name), []).append(module)
    return readers


def _read_by_others(owner: nn.Module, path: str, readers: _Readers) -> bool:
    """Whether other code than the owner's uses a tensor: that of a reader, or of the module that holds it."""
    home, _, name = path.rpartition(".")
    holder = owner.get_submodule(home)
    runs = holder is not owner and type(holder).forward is not nn.Module.forward
    by = [*readers.get((holder, name), ()), *readers.get((None, name), ())]
    return runs or any(reader is not owner for reader in by)


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
