"""From a model to a :class:`ModelGraph`: the module tree, what runs in it, shapes and costs."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from ilmconvert.comparison.calls import Call, Calls, read_calls, taken_whole
from ilmconvert.comparison.counts import Counted, count
from ilmconvert.comparison.describe import attributes, names_of_tensors, role_of, tensors_of
from ilmconvert.comparison.nodes import ModelGraph, Node, Totals
from ilmconvert.graph.inputs import Inputs
from ilmconvert.graph.meta import MetaMode
from ilmconvert.graph.shadow import fake_mode, refuse_opaque, shadow
from ilmconvert.norms import class_name

__all__ = ["read_model"]


def read_model(model: nn.Module, inputs: Inputs | None = None, *, name: str | None = None) -> ModelGraph:
    """Read ``model`` in evaluation mode; it is left as it is.

    Args:
        model: any module.
        inputs: what to call it with, for shapes and counts; it is run on fake tensors.
        name: what to call it; None takes its class.

    Raises:
        ModelError: a lazy or scripted model, or one that cannot be copied.
    """
    refuse_opaque(model)
    fake, meta = fake_mode(), MetaMode(torch.device("cpu"))  # what is traced alone need not know a device
    copy = shadow(model, meta if inputs is None else fake).eval()
    nodes = _Tree(copy).nodes()
    counted = Counted() if inputs is None else count(copy, inputs, fake)
    nodes = [replace(n, output_shapes=counted.shapes.get(n.path, ())) for n in nodes]
    whole = {n.path for n in nodes if n.kind == "module"}
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}.values()
    totals = Totals(
        parameters=sum(p.numel() for p in model.parameters()),
        parameter_bytes=sum(t.numel() * t.element_size() for t in tensors),
        macs=counted.macs,
        activation_bytes=counted.bytes_of(whole),
        input_shapes=counted.input_shapes,
    )
    return ModelGraph(name or type(model).__name__, tuple(nodes), totals, counted.error)


class _Tree:
    """The module tree with the calls in it, siblings in execution order."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.names: dict[nn.Module, list[str]] = {}
        for path, module in model.named_modules(remove_duplicate=False):
            self.names.setdefault(module, []).append(path)
        self.tensors = names_of_tensors(model)
        self.described = {module: attributes(module) for module in self.names}  # forward code may change them
        self.calls: Calls = read_calls(model, {m: names[0] for m, names in self.names.items()})
        self.order = {path: i for i, path in enumerate(self.calls.found)}
        self.functions: dict[str, list[Call]] = {}
        for call in self.calls.found.values():
            if call.cls:
                self.functions.setdefault(call.owner, []).append(call)

    def nodes(self) -> list[Node]:
        return self._below("", None, self.model)[1]

    def _below(self, path: str, parent: str | None, module: nn.Module) -> tuple[int, list[Node]]:
        """The node of ``module`` and all below, and when the first of them runs (-1: never)."""
        node = self._module(path, parent, module)
        if node.kind == "module":
            return self.order.get(path, -1), [node]
        branches = []
        last = -1
        for name, child in module.named_children():
            inner = f"{path}.{name}" if path else name
            if self.names[child][0] != inner:  # an alias; it stands where its first name is
                continue
            first, nodes = self._below(inner, path, child)
            last = max(last, first)
            branches.append((first if first >= 0 else last, nodes))  # what never runs stays after its predecessor
        branches += [(self.order[c.path], [_function(c)]) for c in self.functions.get(path, ())]
        branches.sort(key=lambda branch: branch[0])
        own = self.order.get(path)
        firsts = [first for first, _ in branches if first >= 0] + ([] if own is None else [own])
        return min(firsts, default=-1), [node, *(n for _, nodes in branches for n in nodes)]

    def _module(self, path: str, parent: str | None, module: nn.Module) -> Node:
        whole = taken_whole(module) or (not any(True for _ in module.children()) and path not in self.functions)
        reason = self.calls.untraced.get(path, "")
        call = self.calls.found.get(path)
        kind = "untraced" if reason else "module" if whole else "block"
        return Node(
            path=path,
            parent=parent,
            kind=kind,  # type: ignore[arg-type]
            cls=class_name(type(module)),
            attributes=self.described[module],
            tensors=tensors_of(path, module, self.tensors, whole=whole),
            inputs=tuple(call.inputs) if call else (),
            calls=None if kind == "block" else call.count if call else 0,
            aliases=tuple(self.names[module][1:]),
            role=role_of(module),
            reason=reason,
        )


def _function(call: Call) -> Node:
    arguments = {"arguments": call.arguments} if call.arguments else {}
    return Node(call.path, call.owner, "call", call.cls, arguments, inputs=tuple(call.inputs), calls=call.count)
