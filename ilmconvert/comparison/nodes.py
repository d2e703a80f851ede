"""A model as plain data: every module and every traced call is one node of a tree, with edges between what runs.

::

    ResNet                      block     a module that is looked into
    ├── conv1    Conv2d         module    a module taken as a whole: torch.nn's own, norms, ILM layers
    ├── bn1      BatchNorm2d    module
    ├── relu     ReLU           module
    ├── layer1   Sequential     block
    │   └── ...
    └── :flatten                call      a function or method that a forward pass calls, under the module that calls it

A module whose forward torch.fx cannot follow is one node of kind ``untraced``; the modules in it follow below, each
traced by itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

__all__ = ["Kind", "ModelGraph", "Node", "Role", "TensorInfo", "Totals"]

Kind = Literal["block", "module", "call", "untraced"]
Role = Literal["", "norm", "ilm"]


@dataclass(frozen=True)
class TensorInfo:
    """A parameter or buffer.

    Attributes:
        name: relative to the node's path.
        kind: ``parameter`` or ``buffer``.
        shape, dtype: of the tensor.
        saved: whether the state dict has it.
        tied: full name of the tensor that this one is, where several names share it; empty otherwise.
    """

    name: str
    kind: Literal["parameter", "buffer"]
    shape: tuple[int, ...]
    dtype: str
    saved: bool = True
    tied: str = ""

    def __str__(self) -> str:
        tied = f" tied to {self.tied}" if self.tied else ""
        return f"{self.dtype}[{', '.join(map(str, self.shape))}]{'' if self.saved else ' not saved'}{tied}"


@dataclass(frozen=True)
class Node:
    """One module or call.

    Attributes:
        path: qualified name of a module; of a call, its owner and the function: ``layer1.0:add#2`` is the second
            ``add`` that ``layer1.0`` calls. The model itself has the empty path.
        parent: path of the module it belongs to; None for the model itself.
        kind: see :mod:`ilmconvert.comparison.nodes`.
        cls: qualified class of a module, or name of a function.
        attributes: plain attributes of a module (``eps``, ``stride``, ...) as Python prints them, or a call's
            constant arguments.
        tensors: parameters and buffers: a module's own; of a module taken as a whole, also those inside it.
        inputs: paths of the nodes whose results it takes, in order.
        calls: how often one forward pass runs it; None for blocks.
        aliases: other qualified names of the same module.
        role: ``norm`` for a known norm class, ``ilm`` for an ILM layer.
        reason: why torch.fx cannot follow it, for kind ``untraced``.
        output_shapes: shapes it returns, where an input size was known.
    """

    path: str
    parent: str | None
    kind: Kind
    cls: str
    attributes: dict[str, str] = field(default_factory=dict)
    tensors: tuple[TensorInfo, ...] = ()
    inputs: tuple[str, ...] = ()
    calls: int | None = None
    aliases: tuple[str, ...] = ()
    role: Role = ""
    reason: str = ""
    output_shapes: tuple[tuple[int, ...], ...] = ()

    @property
    def name(self) -> str:
        """The last part of the path: a module's name in its parent, or the call."""
        return self.path[len(self.parent) :].lstrip(".:") if self.parent else self.path.lstrip(":")

    @property
    def class_name(self) -> str:
        """The class or function without its package."""
        return self.cls.rsplit(".", 1)[-1]

    @property
    def parameters(self) -> int:
        """Parameters of its own; tied ones count where they appear first."""
        return sum(math.prod(t.shape) for t in self.tensors if t.kind == "parameter" and not t.tied)

    def state_keys(self) -> tuple[str, ...]:
        """What the state dict calls its tensors, under every name the module has."""
        return tuple(
            f"{path}.{t.name}" if path else t.name
            for path in (self.path, *self.aliases)
            for t in self.tensors
            if t.saved
        )


@dataclass(frozen=True)
class Totals:
    """What a model costs.

    Attributes:
        parameters: tied ones counted once.
        parameter_bytes: bytes of parameters and buffers.
        macs: multiply-accumulates of the matrix products and convolutions of one forward pass, half the FLOPs that
            ``torch.utils.flop_counter`` counts; None where no input was known or the model could not be run.
        activation_bytes: bytes of the results of all modules taken as a whole, in one forward pass; None as above.
        input_shapes: what one forward pass is counted for.
    """

    parameters: int
    parameter_bytes: int
    macs: int | None = None
    activation_bytes: int | None = None
    input_shapes: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True)
class ModelGraph:
    """A model as plain data.

    Attributes:
        name: what the model is called: its class, or what the user called it.
        nodes: all nodes, parents before children, siblings in execution order.
        totals: what the model costs.
        run_error: why the model could not be run for shapes and counts; empty if it could or was not tried.
    """

    name: str
    nodes: tuple[Node, ...]
    totals: Totals
    run_error: str = ""

    @cached_property
    def by_path(self) -> dict[str, Node]:
        """The nodes by path."""
        return {node.path: node for node in self.nodes}

    @cached_property
    def children(self) -> dict[str, tuple[Node, ...]]:
        """The nodes directly below a path, in execution order."""
        below: dict[str, list[Node]] = {}
        for node in self.nodes:
            if node.parent is not None:
                below.setdefault(node.parent, []).append(node)
        return {path: tuple(nodes) for path, nodes in below.items()}

    @property
    def root(self) -> Node:
        """The model itself."""
        return self.nodes[0]
