"""Norms that are a function call: which ones a module's own forward makes, and on which of its tensors.

The module that makes the call (its *owner*) is traced alone, every child a leaf, in both modes: what depends on
``self.training`` then shows as two graphs. A call is the same in both if function, tensors and constants are.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import accumulate
from typing import Any, TypeGuard, cast

from torch import Tensor, fx, nn

from ilmconvert.graph.forward import owner_graphs
from ilmconvert.graph.tracer import FUNCTIONAL_NORMS, harmless_read
from ilmconvert.norms import Refusal

__all__ = [
    "WEIGHT_STANDARDIZATION",
    "Call",
    "FoundCall",
    "as_module",
    "find_calls",
    "from_attributes",
    "function_name",
    "norm_nodes",
]

_SLOTS = ("weight", "bias", "running_mean", "running_var")
_BUILTINS = {  # torch's own functions have no signature to ask
    "torch.layer_norm": ("input", "normalized_shape", "weight", "bias", "eps", "cudnn_enable"),
    "torch.group_norm": ("input", "num_groups", "weight", "bias", "eps", "cudnn_enabled"),
    "torch.rms_norm": ("input", "normalized_shape", "weight", "eps"),
    "torch.instance_norm": ("input", *_SLOTS, "use_input_stats", "momentum", "eps", "cudnn_enabled"),
    "torch.batch_norm": ("input", *_SLOTS, "training", "momentum", "eps", "cudnn_enabled"),
}


@dataclass(frozen=True)
class Call:
    """A norm that its owner calls as a function, as plain data.

    Attributes:
        name: tells the calls of one owner apart; the path of the site is ``owner:name``.
        tensors: ``weight``, ``bias``, ``running_mean``, ``running_var`` to their paths from the owner.
        rank: dimensions of the input; None if unknown.
    """

    name: str
    tensors: dict[str, str] = field(default_factory=dict)
    rank: int | None = None

    @property
    def child(self) -> str:
        """The name that the ILM layer gets in its owner."""
        return f"ilm_{self.name}"

    @property
    def module(self) -> str | None:
        """The path, from the owner, of the submodule that the tensors belong to; None if they are the owner's."""
        homes = {path.rpartition(".")[0] for path in self.tensors.values()}
        return homes.pop() or None if len(homes) == 1 else None


@dataclass(frozen=True)
class FoundCall:
    """A call, the constants it is made with, and the function; or why it cannot be converted."""

    call: Call
    function: str
    constants: Mapping[str, Any] = field(default_factory=dict)
    refusal: Refusal | None = None


@dataclass(frozen=True)
class OwnerCalls:
    """The functional norms of one owner, each once; and in the order its present mode runs them, by name."""

    calls: tuple[FoundCall, ...]
    order: tuple[tuple[str, str], ...]  # function, name

    def share(self, call: FoundCall, shapes: Sequence[Any]) -> tuple[Any, ...] | None:
        """Of what one function was given in a run, what belongs to ``call``; None if the run went another way."""
        order = [name for function, name in self.order if function == call.function]
        if not order or len(shapes) % len(order):
            return None
        return tuple(shape for i, shape in enumerate(shapes) if order[i % len(order)] == call.call.name)


def find_calls(owner: nn.Module, ranks: Mapping[str, int], *, strict: bool = False) -> OwnerCalls:
    """The norms that ``owner``'s forward calls as functions, each once, those of its present mode first.

    Args:
        owner: a (shadow) module.
        ranks: function to the rank of its input, where a run has shown it.
        strict: see :func:`owner_graphs`.

    Raises:
        TraceError: torch.fx cannot follow the owner.
    """
    found: dict[str, FoundCall] = {}
    nodes = norm_nodes(owner_graphs(owner, strict=strict), owner, ranks)
    for mode in (owner.training, not owner.training):
        for _, call in nodes[mode]:
            found.setdefault(call.call.name, call)
    order = tuple((call.function, call.call.name) for _, call in nodes[owner.training])
    return OwnerCalls(tuple(found.values()), order)


def norm_nodes(
    graphs: Mapping[bool, fx.Graph], owner: nn.Module, ranks: Mapping[str, int]
) -> dict[bool, list[tuple[fx.Node, FoundCall]]]:
    """The functional norms of both graphs, named so that a call has one name in both.

    Calls on the same tensors with the same constants are one norm that runs several times. Calls without tensors are
    told apart by their order, if both modes make equally many.
    """
    names: dict[tuple[Any, ...], str] = {}
    taken: Counter[str] = Counter()
    counts = {mode: Counter(_key(node) for node in _norms(graph)) for mode, graph in graphs.items()}
    result: dict[bool, list[tuple[fx.Node, FoundCall]]] = {True: [], False: []}
    batchwise: set[str] = set()  # calls that take the batch's statistics in evaluation too
    for mode in (False, True):
        ordinals: Counter[tuple[Any, ...]] = Counter()
        reads = {n.target for n in graphs[mode].nodes if n.op == "get_attr" and not harmless_read(n)}
        for node in _norms(graphs[mode]):
            key = _key(node)
            ordinals[key] += 1
            arguments = _arguments(node)
            tensors = {slot: str(v.target) for slot in _SLOTS if _is_attribute(v := arguments.get(slot))}
            name = _name(names, taken, key if tensors else (*key, ordinals[key]), tensors)
            if not mode and arguments.get("training") is True:
                batchwise.add(name)
            if name in batchwise:
                tensors = {slot: path for slot, path in tensors.items() if not slot.startswith("running")}
            refusal = _refusal(node, arguments, owner, reads)
            if not tensors and 0 not in (n := {c[key] for c in counts.values()}) and len(n) > 1:
                refusal = Refusal("functional", "training and evaluation make different numbers of such calls")
            function = function_name(node)
            constants = {k: v for k, v in arguments.items() if k not in ("input", *_SLOTS)}
            call = Call(name, tensors, ranks.get(function))
            result[mode].append((node, FoundCall(call, function, constants, refusal)))
    return result


def function_name(node: fx.Node) -> str:
    """The full name of the norm function that a node calls."""
    return FUNCTIONAL_NORMS[cast("Callable[..., Any]", node.target)]


def _norms(graph: fx.Graph) -> list[fx.Node]:
    return [n for n in graph.nodes if n.op == "call_function" and n.target in FUNCTIONAL_NORMS]


def _key(node: fx.Node) -> tuple[Any, ...]:
    """Function, tensors and constants: what makes two calls the same norm."""
    arguments = {k: v for k, v in _arguments(node).items() if k not in ("input", "training")}
    values = ((k, v.target if _is_attribute(v) else v) for k, v in arguments.items())
    return function_name(node), repr(sorted((k, repr(v)) for k, v in values))


def _name(
    names: dict[tuple[Any, ...], str], taken: Counter[str], key: tuple[Any, ...], tensors: Mapping[str, str]
) -> str:
    """The name of a call; ``taken`` counts the names that begin with the same words."""
    if key not in names:
        base = "_".join(
            [key[0].rpartition(".")[2], *(tensors[s].replace(".", "_") for s in ("weight",) if s in tensors)]
        )
        names[key] = f"{base}_{taken[base] + 1}" if taken[base] else base
        taken.update(accumulate(names[key].split("_"), "{}_{}".format))
    return names[key]


def _is_attribute(value: Any) -> TypeGuard[fx.Node]:
    return isinstance(value, fx.Node) and value.op == "get_attr"


def _arguments(node: fx.Node) -> dict[str, Any]:
    """The call's arguments by name, defaults filled in; a ``normalized_shape`` taken from the input is its weight's."""
    arguments = _bound_arguments(node)
    computed = any(isinstance(v, fx.Node) for v in _flat(arguments.get("normalized_shape")))
    if computed and any(_is_attribute(arguments.get(slot)) for slot in ("weight", "bias")):
        arguments["normalized_shape"] = None
    return arguments


def _bound_arguments(node: fx.Node) -> dict[str, Any]:
    function = function_name(node)
    if names := _BUILTINS.get(function):
        return {"eps": None if "rms" in function else 1e-5, **dict(zip(names, node.args, strict=False)), **node.kwargs}
    if "native" in function:
        return {"input": node.args[0] if node.args else node.kwargs.get("input")}
    bound = _signature(node.target).bind(*node.args, **node.kwargs)
    bound.apply_defaults()
    return dict(bound.arguments)


@cache
def _signature(function: Any) -> inspect.Signature:
    return inspect.signature(function)


def _refusal(node: fx.Node, arguments: Mapping[str, Any], owner: nn.Module, reads: set[Any]) -> Refusal | None:
    function = function_name(node)
    if from_attributes(arguments["input"]):
        return WEIGHT_STANDARDIZATION
    if "native" in function:
        return Refusal("functional", f"{function} returns its statistics too; call the norm without them, or a module")
    for slot in _SLOTS:
        value = arguments.get(slot)
        if isinstance(value, fx.Node) and value.op != "get_attr":
            return Refusal("functional", f"its {slot} is computed in the forward pass, so no layer can own it")
        if slot in ("weight", "bias") and _is_attribute(value) and not isinstance(_at(owner, value), nn.Parameter):
            return Refusal("functional", f"its {slot} is not a parameter of the module that calls it")
    if reads.intersection(v.target for slot in _SLOTS if _is_attribute(v := arguments.get(slot))):
        return Refusal("parameters-read", "other code computes with its parameters too")
    for name, value in arguments.items():
        if name not in ("input", *_SLOTS) and any(isinstance(v, fx.Node) for v in _flat(value)):
            return Refusal("functional", f"its {name} depends on the input, so it is no layer of fixed size")
    if "instance_norm" in function and (arguments.get("running_mean") is not None):
        return Refusal("functional", "it keeps running statistics of instances; use nn.InstanceNorm")
    return None


WEIGHT_STANDARDIZATION = Refusal(
    "weight-standardization", "it standardizes what its module holds, a convolution's weight say, not an activation"
)


def _flat(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def _at(owner: nn.Module, node: fx.Node) -> Any:
    return _tensor_at(owner, str(node.target))


def _tensor_at(owner: nn.Module, path: str) -> Tensor | None:
    """The parameter or buffer at ``path`` below ``owner``."""
    home, _, name = path.rpartition(".")
    found = getattr(owner.get_submodule(home), name, None)
    return found if isinstance(found, Tensor) else None


def from_attributes(source: Any) -> bool:
    """Whether a norm's input is computed from the module's own tensors alone: then it standardizes a weight."""
    seen, stack = set(), [source]
    while stack:
        node = stack.pop()
        if not isinstance(node, fx.Node) or node in seen:
            continue
        if node.op in ("placeholder", "call_module"):
            return False
        seen.add(node)
        stack.extend(node.all_input_nodes)
    return True


def as_module(found: FoundCall, owner: nn.Module, channels: int | None) -> nn.Module | Refusal:
    """The torch module that computes what the call does, holding the owner's own tensors.

    Args:
        found: the call, not refused.
        owner: the module that makes it.
        channels: the length of the input's dimension 1, where a run has shown it.
    """
    tensors = {slot: _tensor_at(owner, path) for slot, path in found.call.tensors.items()}
    known = next((t for t in tensors.values() if t is not None), None)
    width = channels if known is None else known.numel()
    kind, constants = found.function.rpartition(".")[2], found.constants
    if kind in ("layer_norm", "rms_norm"):
        made: nn.Module | Refusal = _last_dimensions(kind, constants, None if known is None else known.shape)
    elif width is None:
        return Refusal("functional", "it has no parameters and no input is known, so neither is its width: give inputs")
    else:
        made = _channelwise(kind, constants, width, found.call.rank, stats="running_mean" in tensors)
    if isinstance(made, Refusal):
        return made
    for slot, tensor in tensors.items():
        setattr(made, slot, tensor)
    return made.train(owner.training)


def _last_dimensions(kind: str, constants: Mapping[str, Any], of_weight: Sequence[int] | None) -> nn.Module:
    given = constants["normalized_shape"]
    shape = tuple(int(length) for length in _flat(of_weight if given is None else given))
    if kind == "rms_norm":
        return nn.RMSNorm(shape, eps=constants["eps"], elementwise_affine=False)
    return nn.LayerNorm(shape, eps=constants["eps"], elementwise_affine=False)


def _channelwise(
    kind: str, constants: Mapping[str, Any], width: int, rank: int | None, *, stats: bool
) -> nn.Module | Refusal:
    eps = constants["eps"]
    if kind == "group_norm":
        return nn.GroupNorm(int(constants["num_groups"]), width, eps=eps, affine=False)
    instance = kind == "instance_norm"
    classes: dict[int, type[nn.Module]] = (
        {3: nn.InstanceNorm1d, 4: nn.InstanceNorm2d, 5: nn.InstanceNorm3d}
        if instance
        else {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
    )
    if rank not in classes:
        return Refusal(
            "functional", "its input's rank is not known (give example inputs) or differs between such calls"
        )
    made = classes[rank](width, eps=eps, affine=False, track_running_stats=stats)
    if stats:
        made.num_batches_tracked = None  # type: ignore[assignment]
    return made
