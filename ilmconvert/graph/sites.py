"""Where the norms are: every norm module by an independent walk, and what the graph and a run know of each."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass
from types import SimpleNamespace

import torch
from torch import nn
from torch.nn.utils import parametrize

from ilmconvert.graph.calls import Call
from ilmconvert.graph.explore import Exploration
from ilmconvert.graph.functional import FunctionalNorm, functional_norms
from ilmconvert.graph.inputs import Inputs, first_tensor
from ilmconvert.graph.meta import MetaMode
from ilmconvert.graph.run import Run, record_run
from ilmconvert.graph.shadow import fake_mode, refuse_opaque, shadow
from ilmconvert.norms import Entry, NormSpec, Refusal, class_name, find
from ilmconvert.norms.parametrized import own_parameters

__all__ = ["Site", "SiteSearch", "find_sites", "norm_paths"]


@dataclass(frozen=True)
class Site:
    """One norm of a model.

    Attributes:
        paths: all qualified names of the module; the first is the canonical one, the others are aliases of a tied
            norm. A functional norm has the path of the call: owner and node.
        norm: qualified name of the class, or of the function.
        family: batch, group, layer, instance or rms; None where the norm cannot be converted.
        spec: what it computes; None where the norm cannot be converted.
        refusal: why it cannot be converted.
        parameters: how many parameters the norm itself has (its activation's not counted).
        training: the module's own flag.
        found: ``graph``, ``graph (other mode)``, ``inside PATH`` (a traced piece), ``run`` or ``walk``.
        calls: how often one forward pass runs it; None if unknown.
        input_shapes: the input's shape in each of these calls, where an input size was known.
        call: what is known of a functional norm's call; None for a module.
        read_by: calls (``owner:name``) of a norm function on this module's own parameters; they are made to run the
            layer that takes the module's place.
        parametrized: its scale or shift is computed by ``torch.nn.utils.parametrize``.
    """

    paths: tuple[str, ...]
    norm: str
    family: str | None = None
    spec: NormSpec | None = None
    refusal: Refusal | None = None
    parameters: int = 0
    training: bool = False
    found: str = "walk"
    calls: int | None = None
    input_shapes: tuple[tuple[int, ...], ...] = ()
    call: Call | None = None
    read_by: tuple[str, ...] = ()
    parametrized: bool = False

    def __post_init__(self) -> None:
        if not self.paths:
            raise ValueError("a site must have a path")

    @property
    def path(self) -> str:
        """The canonical qualified name."""
        return self.paths[0]

    @property
    def owner(self) -> str:
        """Path of the module that makes a functional norm's call."""
        return self.path.rpartition(":")[0]

    @property
    def layer_path(self) -> str:
        """Where the ILM layer of a converted norm is."""
        if self.call is None:
            return self.path
        return f"{self.owner}.{self.call.child}" if self.owner else self.call.child

    @property
    def idle(self) -> bool:
        """Whether it is known not to run, by a call of the module or of a function on its parameters."""
        return self.calls == 0 and not self.read_by

    @property
    def class_name(self) -> str:
        """The class's short name."""
        return self.norm.rsplit(".", 1)[-1]


@dataclass(frozen=True)
class SiteSearch:
    """The sites of a model in execution order, and how the search went.

    Attributes:
        sites: every norm.
        untraced: module path to the reason why torch.fx could not follow it; ``""`` is the whole model.
        run_error: why the model could not be run on fake tensors; None if it could, or no input size was known.
        shapes_known: whether a run recorded input shapes.
    """

    sites: tuple[Site, ...]
    untraced: dict[str, str] = field(default_factory=dict)
    run_error: str | None = None
    shapes_known: bool = False


def find_sites(model: nn.Module, inputs: Inputs | None = None) -> SiteSearch:
    """Find every norm of ``model``, which is left as it is.

    Args:
        model: any module, in any mode.
        inputs: what to call it with; gives shapes and call counts.

    Raises:
        ModelError: a lazy module, or a model that cannot be copied.
    """
    refuse_opaque(model)
    like = first_tensor(model)
    mode = MetaMode(torch.device("cpu") if like is None else like.device)
    copy = shadow(model, mode)
    norms = norm_paths(copy)
    exploration = Exploration(copy, set(norms)).explore()
    run = Run() if inputs is None else record_run(copy, inputs, mode, set(norms))
    if run.error and inputs is not None:  # the forward pass asks for more than meta tensors know
        fake = fake_mode()
        again = shadow(model, fake)
        run = record_run(again, inputs, fake, set(norm_paths(again)))
    ran = (copy.get_submodule(path) for path in run.shapes)
    in_order = dict.fromkeys([*ran, *exploration.found, *norms])  # what ran first, then what was seen first
    functional = functional_norms(copy, exploration, run)
    readers: dict[str, list[FunctionalNorm]] = {}
    for norm in functional:
        readers.setdefault(norm.reads or "", []).append(norm)
    names = _names(copy, {norm.module for norm in functional})
    calls = [_call_site(norm, names.get(norm.module, [norm.owner])) for norm in readers.pop("", ())]
    sites = [_site(module, norms[module], exploration, run, readers) for module in in_order]
    return SiteSearch(
        sites=(*sites, *calls, *_unregistered_sites(model)),  # tracing leaves proxies in the copy's containers
        untraced=exploration.untraced,
        run_error=run.error,
        shapes_known=inputs is not None and run.error is None,
    )


def norm_paths(model: nn.Module) -> dict[nn.Module, tuple[str, ...]]:
    """Every module that is a norm, or calls itself one, with all its qualified names.

    Norms inside a norm's own module (a fused activation holds none) belong to it.
    """
    paths: dict[nn.Module, list[str]] = {}
    inside: set[nn.Module] = set()
    for name, module in model.named_modules(remove_duplicate=False):
        if module in paths:
            paths[module].append(name)
        elif module not in inside and find(module) is not None:
            paths[module] = [name]
            inside.update(m for m in module.modules() if m is not module)
    return {module: tuple(names) for module, names in paths.items()}


def _site(
    module: nn.Module,
    paths: tuple[str, ...],
    exploration: Exploration,
    run: Run,
    readers: Mapping[str, Sequence[FunctionalNorm]],
) -> Site:
    found = find(module)
    reading = [norm for path in paths for norm in readers.get(path, ())]
    read_by, blocked = _reading(reading, module in exploration.read)
    found = blocked if blocked is not None and isinstance(found, Entry) else found
    entry = found if isinstance(found, Entry) else None
    shapes = run.shapes.get(paths[0], ())
    calls: int | None = exploration.calls.get(module)
    if run.completed:
        calls = len(shapes)
    return Site(
        paths=paths,
        norm=class_name(type(module)),
        family=entry.handler.family if entry else None,
        spec=entry.describe(module) if entry else None,
        refusal=found if isinstance(found, Refusal) else None,
        parameters=own_parameters(module),
        training=module.training,
        found=exploration.found.get(module) or ("run" if shapes else "walk"),
        calls=calls,
        input_shapes=tuple(dict.fromkeys(shapes)),
        read_by=read_by,
        parametrized=parametrize.is_parametrized(module),
    )


def _reading(calls: Sequence[FunctionalNorm], read: bool) -> tuple[tuple[str, ...], Refusal | None]:
    """The calls on a norm module's own parameters that can be redirected, or why the module has to stay."""
    blocked = next((norm.refusal for norm in calls if norm.refusal), None)
    if blocked is not None:
        reason = f"{calls[0].owner or 'the model'} uses its parameters in a function call: {blocked.reason}"
        return (), Refusal("parameters-read", reason)
    if read:
        return (), Refusal(
            "parameters-read", "the code around it reads its parameters or attributes or asks for its class"
        )
    return tuple(norm.path for norm in calls), None


def _names(model: nn.Module, modules: set[nn.Module]) -> dict[nn.Module, list[str]]:
    """All qualified names of some modules."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False) if modules else ():
        if module in modules:
            names.setdefault(module, []).append(name)
    return names


def _call_site(norm: FunctionalNorm, names: Sequence[str]) -> Site:
    spec = norm.spec
    return Site(
        paths=tuple(f"{name}:{norm.name}" if name else norm.name for name in names),
        norm=norm.function,
        family=norm.family,
        spec=spec,
        refusal=norm.refusal,
        parameters=norm.parameters,
        training=norm.training,
        found=norm.found,
        calls=norm.calls,
        input_shapes=norm.shapes,
        call=norm.call,
    )


_UNREGISTERED = Refusal(
    "unregistered", "it is kept in a plain Python container, where no state dict sees it; use ModuleList or ModuleDict"
)


def _unregistered_sites(model: nn.Module) -> Iterator[Site]:
    """Norms in plain containers: torch does not know them as submodules."""
    registered, torchs_own = set(model.modules()), vars(nn.Module()).keys()
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            hidden = _held(name, value, depth=3) if name not in torchs_own else ()
            for place, norm in hidden:
                if norm not in registered and find(norm) is not None:
                    full = f"{path}.{place}" if path else place
                    yield Site((full,), class_name(type(norm)), refusal=_UNREGISTERED, training=norm.training)


def _held(place: str, value: object, depth: int) -> Iterator[tuple[str, nn.Module]]:
    """The modules in a container, and in containers in it, and theirs."""
    items: Iterable[tuple[str, object]] = ()
    if isinstance(value, dict):
        items = ((f"[{key!r}]", item) for key, item in value.items())
    elif isinstance(value, (list, tuple, deque, set)):
        items = ((f"[{index}]", item) for index, item in enumerate(value))
    elif is_dataclass(value) or isinstance(value, SimpleNamespace):
        items = ((f".{key}", item) for key, item in getattr(value, "__dict__", {}).items())
    for key, item in items if depth else ():
        inner = f"{place}{key}"
        if isinstance(item, nn.Module):
            yield from ((f"{inner}.{name}" if name else inner, m) for name, m in item.named_modules())
        else:
            yield from _held(inner, item, depth - 1)
