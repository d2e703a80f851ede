"""The functional norms of a model: what tracing and running saw, joined with what each owner's own forward tells."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from torch import fx, nn

from ilmconvert.graph.calls import (
    WEIGHT_STANDARDIZATION,
    Call,
    FoundCall,
    as_module,
    find_calls,
    from_attributes,
    function_name,
)
from ilmconvert.graph.explore import Exploration
from ilmconvert.graph.mentions import mentioned_norms, methods_with_norms, own_reads, read_attributes
from ilmconvert.graph.run import FunctionalCall, Run, Shapes
from ilmconvert.graph.tracer import TraceError
from ilmconvert.norms import Entry, NormSpec, Refusal, find

__all__ = ["FunctionalNorm", "functional_norms"]


@dataclass(frozen=True)
class FunctionalNorm:
    """One norm that a module calls as a function; see :class:`ilmconvert.graph.sites.Site` for the fields.

    Attributes:
        module: the owner.
        reads: path of the norm module whose parameters the call uses; None where there is none.
    """

    owner: str
    module: nn.Module
    name: str
    function: str
    found: str
    refusal: Refusal | None = None
    family: str | None = None
    spec: NormSpec | None = None
    parameters: int = 0
    calls: int | None = None
    shapes: Shapes = ()
    call: Call | None = None
    reads: str | None = None

    @property
    def path(self) -> str:
        """Owner and call."""
        return f"{self.owner}:{self.name}" if self.owner else self.name

    @property
    def training(self) -> bool:
        """The owner's flag."""
        return self.module.training


def functional_norms(model: nn.Module, exploration: Exploration, run: Run) -> tuple[FunctionalNorm, ...]:
    """Every functional norm of a (shadow) model, convertible or refused."""
    nodes: dict[str, list[fx.Node]] = {}
    for owner, node, _ in exploration.functional:
        nodes.setdefault(owner, []).append(node)
    ran: dict[str, dict[FunctionalCall, Shapes]] = {}
    for call, shapes in run.functional.items():
        ran.setdefault(call.owner, {})[call] = shapes
    owners = dict.fromkeys([*nodes, *ran])
    if not run.completed:
        owners |= dict.fromkeys(_mentioning(model, exploration))
    seen: set[nn.Module] = set()
    called = frozenset(name for m in model.modules() for _, name in read_attributes(m)) if owners else frozenset()
    result: list[FunctionalNorm] = []
    for owner in owners:
        module = model.get_submodule(owner)
        if module not in seen:
            seen.add(module)
            result += _of_owner(owner, module, nodes.get(owner, []), ran.get(owner, {}), run, exploration, called)
    return tuple(result)


def _mentioning(model: nn.Module, exploration: Exploration) -> Iterator[str]:
    """Modules whose code names a norm function: without a run to its end, it is not known whether they call it."""
    inside = {m for norm in exploration.norms for m in norm.modules()}
    return (path for path, m in model.named_modules() if m not in inside and mentioned_norms(m))


def _of_owner(
    owner: str,
    module: nn.Module,
    nodes: list[fx.Node],
    ran: Mapping[FunctionalCall, Shapes],
    run: Run,
    exploration: Exploration,
    called: frozenset[str],
) -> Iterator[FunctionalNorm]:
    how = "graph" if nodes else "run" if ran else "walk"
    try:
        found = find_calls(module, _ranks(ran), strict=True)
    except TraceError as error:
        yield from _untraced(owner, module, nodes, ran, run.completed, str(error))
        return
    for call in found.calls:
        shapes = found.share(call, [s for c, given in ran.items() if c.function == call.function for s in given])
        reads = _norm_read(owner, module, call, exploration)
        yield _described(owner, module, call, shapes, how, run, reads, called)
    for other in ran:
        if not any(other.function == c.function for c in found.calls):  # inside a helper that the trace did not enter
            why = "a helper function makes the call"
            yield _refused(owner, module, other.function, other.on_weight, "run", why, other.reads)


def _ranks(ran: Mapping[FunctionalCall, Shapes]) -> dict[str, int]:
    """Function to the rank of its input; none for a function whose calls differ in it."""
    ranks: dict[str, set[int]] = {}
    for call, shapes in ran.items():
        ranks.setdefault(call.function, set()).update(len(shape) for shape in shapes)
    return {function: seen.pop() for function, seen in ranks.items() if len(seen) == 1}


def _norm_read(owner: str, module: nn.Module, call: FoundCall, exploration: Exploration) -> str | None:
    if (child := call.call.module) is None or module.get_submodule(child) not in exploration.norms:
        return None
    return f"{owner}.{child}" if owner else child


def _described(
    owner: str,
    module: nn.Module,
    found: FoundCall,
    shapes: Shapes | None,
    how: str,
    run: Run,
    reads: str | None,
    called: frozenset[str],
) -> FunctionalNorm:
    refusal = found.refusal
    if refusal is None and isinstance(module, fx.GraphModule):
        refusal = Refusal("functional", "a GraphModule makes the call: convert the model before torch.fx traces it")
    others = [name for name, functions in methods_with_norms(module, called).items() if found.function in functions]
    if refusal is None and others:
        refusal = Refusal(
            "functional", f"only a forward is rewritten, and the method {others[0]!r} makes such calls too"
        )
    used = {path.partition(".")[0] for path in found.call.tensors.values()}
    readers = [name for name, read in own_reads(module, called).items() if read & used]
    if refusal is None and readers:
        refusal = Refusal("parameters-read", f"its module's method {readers[0]!r} reads its parameters too")
    if refusal is None and owner in run.losses:
        refusal = Refusal("functional", run.losses[owner])
    channels = shapes[0][1] if shapes and len(shapes[0]) > 1 else None
    norm = refusal or as_module(found, module, channels)
    entry = find(norm) if isinstance(norm, nn.Module) else norm
    child = module.get_submodule(found.call.module) if reads and found.call.module else None
    if child is not None and isinstance(entry, Entry) and isinstance(norm, nn.Module):
        own = find(child)
        if not isinstance(own, Entry) or own.handler.describe(child) != entry.handler.describe(norm):
            entry = Refusal("functional", "it computes something else than the norm module whose parameters it uses")
    result = FunctionalNorm(
        owner,
        module,
        found.call.name,
        found.function,
        how,
        refusal=entry if isinstance(entry, Refusal) else None,
        calls=len(shapes) if run.completed and shapes is not None else None,
        shapes=tuple(dict.fromkeys(shapes or ())),
        reads=reads,
    )
    if not isinstance(entry, Entry) or not isinstance(norm, nn.Module):
        return result
    spec, parameters = entry.handler.describe(norm), sum(p.numel() for p in norm.parameters())
    return replace(result, family=entry.handler.family, spec=spec, parameters=parameters, call=found.call)


def _untraced(
    owner: str, module: nn.Module, nodes: list[fx.Node], ran: Iterable[FunctionalCall], completed: bool, error: str
) -> Iterator[FunctionalNorm]:
    """Without the owner's graph, the calls are known by what the whole graph and the run saw."""
    functions = set()
    why = f"torch.fx cannot follow the module that makes the call: {error}"
    for node in nodes:
        functions.add(function := function_name(node))
        x = node.args[0] if node.args else node.kwargs.get("input")
        yield _refused(owner, module, function, from_attributes(x), "graph", why, name=node.name)
    for call in ran:
        if call.function not in functions:
            functions.add(call.function)
            yield _refused(owner, module, call.function, call.on_weight, "run", why, call.reads)
    for function in sorted(mentioned_norms(module) - functions) if not completed else ():
        yield _refused(owner, module, function, False, "walk", why)


def _refused(
    owner: str,
    module: nn.Module,
    function: str,
    on_weight: bool,
    found: str,
    why: str,
    reads: str | None = None,
    name: str | None = None,
) -> FunctionalNorm:
    refusal = WEIGHT_STANDARDIZATION if on_weight else Refusal("functional", why)
    return FunctionalNorm(owner, module, name or function, function, found, refusal, calls=1, reads=reads)
