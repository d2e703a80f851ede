"""Trace a model whole if torch.fx can, and otherwise piece by piece, down to the norms inside leaf modules."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import fx, nn

from ilmconvert.graph.mentions import asked_classes, mentioned_norms, read_attributes
from ilmconvert.graph.tracer import FUNCTIONAL_NORMS, TraceError, harmless_read, trace
from ilmconvert.nn import ILMNorm
from ilmconvert.norms import find

__all__ = ["Exploration", "owner_path"]

_ILM = ILMNorm(1, device=torch.device("meta"))  # for what such a layer has


@dataclass
class Exploration:
    """What tracing found out about the norms of one (shadow) model.

    Attributes:
        model: the root.
        norms: the modules looked for.
        found: norm to how it was found, in the order of discovery.
        calls: norm to the number of call nodes.
        functional: (owner path, node, function name) of norms that are plain calls.
        read: norms whose tensors the forward code around them uses, or attributes that an ILM layer has not, or for
            whose class it asks.
        untraced: module path to the reason it could not be traced.
    """

    model: nn.Module
    norms: set[nn.Module]
    found: dict[nn.Module, str] = field(default_factory=dict)
    calls: dict[nn.Module, int] = field(default_factory=dict)
    functional: list[tuple[str, fx.Node, str]] = field(default_factory=list)
    read: set[nn.Module] = field(default_factory=set)
    untraced: dict[str, str] = field(default_factory=dict)

    def explore(self) -> Exploration:
        """Trace in the model's own mode; if that may miss norms, in the opposite mode too."""
        self._piece("", self.model, "graph")
        if self._missing(self.model) or self._may_call_norms(self.model):
            self._explore_other_mode()
        self._read_by_code()
        return self

    def _read_by_code(self) -> None:
        """Add what no graph shows: reads behind a branch on values, of what an ILM layer has not, and of classes."""
        for path, module in self.model.named_modules():
            for child, attribute in read_attributes(module):
                unseen = attribute in ("weight", "bias") and path in self.untraced
                if unseen or not hasattr(_ILM, attribute):
                    self.read |= {module._modules.get(child)} & self.norms
                if child == "*" and not hasattr(_ILM, attribute):
                    self.read |= {norm for norm in self._held_by(module) if hasattr(norm, attribute)}
            if asked := tuple(cls for cls in asked_classes(module) if not isinstance(_ILM, cls)):
                self.read |= {norm for norm in self._held_by(module) if isinstance(norm, asked)}

    def _held_by(self, module: nn.Module) -> set[nn.Module]:
        """The norms among the children of a module and in its lists."""
        held, todo = set(), list(module.children())
        while todo:
            child = todo.pop()
            held |= {child} & self.norms
            todo += child.children() if isinstance(child, (nn.ModuleList, nn.ModuleDict, nn.Sequential)) else ()
        return held

    def _explore_other_mode(self) -> None:
        """Add what only the other mode reaches; calls and reasons stay those of the model's own mode."""
        flags = {m: m.training for m in self.model.modules()}
        self.model.train(not self.model.training)
        other = Exploration(self.model, self.norms - set(self.found))
        other._piece("", self.model, "graph")
        for module, flag in flags.items():
            module.training = flag
        self.found.update({module: f"{how} (other mode)" for module, how in other.found.items()})
        self.calls.update(dict.fromkeys(other.found, 0))
        known = {(owner, function) for owner, _, function in self.functional}
        self.functional += [call for call in other.functional if (call[0], call[2]) not in known]

    def _missing(self, module: nn.Module) -> bool:
        return any(m in self.norms and m not in self.found for m in module.modules())

    def _piece(self, path: str, module: nn.Module, how: str) -> None:
        """Trace ``module`` as a root, or its children where that fails."""
        if module in self.norms:
            self._reach(module, how)
            return
        try:
            graph = None if isinstance(module, (nn.ModuleList, nn.ModuleDict)) else trace(module)
        except TraceError as error:
            self.untraced[path], graph = str(error), None
        if graph is None:
            self._children(path, module)
            return
        for node in graph.nodes:
            self._node(path, module, node, how)

    def _children(self, path: str, module: nn.Module) -> None:
        for name, child in module.named_children():
            inner = f"{path}.{name}" if path else name
            if self._missing(child) or self._may_call_norms(child):
                self._piece(inner, child, f"inside {inner}")

    def _may_call_norms(self, module: nn.Module) -> bool:
        return any(mentioned_norms(m) and find(m) is None for m in module.modules())

    def _node(self, path: str, root: nn.Module, node: fx.Node, how: str) -> None:
        if node.op == "call_function" and node.target in FUNCTIONAL_NORMS:
            self.functional.append((owner_path(path, node), node, FUNCTIONAL_NORMS[node.target]))
        if node.op == "get_attr" and not harmless_read(node):
            home = root.get_submodule(str(node.target).rpartition(".")[0])
            self.read |= {home} & self.norms
        if node.op != "call_module":
            return
        module = root.get_submodule(str(node.target))
        inner = f"{path}.{node.target}" if path else str(node.target)
        if module in self.norms:
            self._reach(module, how)
        elif self._missing(module):
            self._piece(inner, module, f"inside {inner}")

    def _reach(self, module: nn.Module, how: str) -> None:
        self.found.setdefault(module, how)
        self.calls[module] = self.calls.get(module, 0) + 1


def owner_path(path: str, node: fx.Node) -> str:
    """Qualified name of the innermost module whose forward makes the call."""
    stack = node.meta.get("nn_module_stack") or {}
    inner = next(reversed(stack.values()), ("",))[0] if stack else ""
    return ".".join(part for part in (path, inner) if part)
