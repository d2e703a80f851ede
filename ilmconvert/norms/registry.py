"""The one table of norm classes that tracer, planner, docs and contract tests read.

A class is registered by its qualified name, so that no library is imported to recognise its layers. A module belongs
to the registered class that comes first in its method resolution order, and only if it runs that class's ``forward``:
a subclass that overrides it computes something else, and is refused rather than guessed at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar, TypeVar

from torch import Tensor, nn

from ilmconvert.errors import UsageError
from ilmconvert.nn import ILMNorm
from ilmconvert.norms.spec import NormSpec

__all__ = [
    "Entry",
    "NormHandler",
    "Refusal",
    "class_name",
    "entries",
    "find",
    "has_act",
    "refuse",
    "register",
    "returns_input_dtype",
]


class NormHandler:
    """How one family of norms is described and what its scale and shift are.

    Subclass it, set :attr:`family`, implement :meth:`describe` and decorate with :func:`register`.

    Example:
        >>> from ilmconvert.nn import Standardization
        >>> class TokenNorm(NormHandler):
        ...     family = "layer"
        ...     def describe(self, module):
        ...         return NormSpec(module.normalized_shape, 1, Standardization(layout="token", eps=module.eps))
        >>> norm = nn.LayerNorm(8)
        >>> TokenNorm().describe(norm).num_channels, TokenNorm().affine(norm, num_groups=1)[0] is norm.weight
        (8, True)
    """

    family: ClassVar[str] = ""

    def describe(self, module: nn.Module) -> NormSpec:
        """Return what ``module`` computes; a handler has to implement it."""
        raise NotImplementedError

    def affine(self, module: nn.Module, num_groups: int) -> tuple[Tensor | None, Tensor | None]:
        """Scale and shift of the ILM layer when its predictor is silent; None for absent ones.

        Args:
            module: the norm.
            num_groups: the groups that stage 1 of the new layer will use.
        """
        return getattr(module, "weight", None), getattr(module, "bias", None)

    def set_predictor_(self, module: nn.Module, layer: ILMNorm) -> None:
        """Let the predictor of a new layer start otherwise than silent; it stays silent for norms that are exact so."""


def has_act(module: nn.Module) -> bool:
    """Whether a norm carries dropout and activation, as timm's fused classes do under these names."""
    return all(isinstance(getattr(module, name, None), nn.Module) for name in ("drop", "act"))


def returns_input_dtype(module: nn.Module) -> bool:
    """Whether it is one of timm's ``*Fp32`` classes, which compute in float32 and cast back."""
    return any(cls.__name__.endswith("Fp32") for cls in type(module).__mro__)


@dataclass(frozen=True)
class Entry:
    """One registered class: its qualified name and its handler."""

    name: str
    handler: NormHandler

    def describe(self, module: nn.Module) -> NormSpec:
        """What the handler says that ``module`` computes.

        Raises:
            UsageError: it says something else.
        """
        spec = self.handler.describe(module)
        if not isinstance(spec, NormSpec) or not isinstance(spec.shape, tuple):
            raise UsageError(
                f"expected describe() of {type(self.handler).__name__} to return a NormSpec with a tuple for its "
                f"shape, got {spec!r:.100}"
            )
        return spec


@dataclass(frozen=True)
class Refusal:
    """Why a module that looks like a norm is not converted."""

    code: str
    reason: str


Handler = TypeVar("Handler", bound=type[NormHandler])

_TABLE: dict[str, Entry | Refusal] = {}
_TENSORS = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
_STATE_METHODS = ("_load_from_state_dict", "_save_to_state_dict", "get_extra_state", "set_extra_state")
_STATE_HOOKS = (
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
_PARTS = ("drop.", "act.", "parametrizations.")  # modules of a norm that its layer takes over
_NEVER_NORMS = ("WeightNorm", "SpectralNorm")  # parametrizations of weights, not of activations
_WITH_MATRIX = (nn.Linear, nn.Bilinear, nn.Embedding, nn.modules.conv._ConvNd)


def class_name(cls: type) -> str:
    """The name a class is registered under.

    Example:
        >>> class_name(nn.GroupNorm)
        'torch.nn.modules.normalization.GroupNorm'
    """
    return f"{cls.__module__}.{cls.__qualname__}"


def register(*classes: type | str) -> Callable[[Handler], Handler]:
    """Class decorator: let a :class:`NormHandler` convert ``classes`` (types, or qualified names).

    Raises:
        UsageError: a class is registered already.

    Example:
        >>> import torch
        >>> class MyNorm(torch.nn.Module):
        ...     def __init__(self, channels):
        ...         super().__init__()
        ...         self.weight = torch.nn.Parameter(torch.ones(channels))
        ...     def forward(self, x):
        ...         return torch.nn.functional.layer_norm(x, x.shape[-1:], self.weight, None, 1e-5)
        >>> @register(MyNorm)
        ... class MyHandler(NormHandler):
        ...     family = "layer"
        ...     def describe(self, module):
        ...         return NormSpec(tuple(module.weight.shape), 1, Standardization(layout="token"), bias=False)
        >>> from ilmconvert.nn import Standardization
        >>> isinstance(find(MyNorm(8)), Entry)
        True
    """

    def decorate(handler: Handler) -> Handler:
        for cls in classes:
            _add(cls if isinstance(cls, str) else class_name(cls), handler())
        return handler

    return decorate


def refuse(names: tuple[str, ...], code: str, reason: str) -> None:
    """Register classes that are norms but have no ILM equivalent."""
    for name in names:
        _add(name, Refusal(code, reason))


def _add(name: str, value: NormHandler | Refusal) -> None:
    if name in _TABLE:
        raise UsageError(f"expected an unregistered norm class, got {name}, which is registered already")
    _TABLE[name] = value if isinstance(value, Refusal) else Entry(name, value)


def entries() -> Iterator[tuple[str, Entry | Refusal]]:
    """All registered classes, in order of registration."""
    yield from _TABLE.items()


def find(module: nn.Module) -> Entry | Refusal | None:
    """The entry that converts ``module``, a refusal with its reason, or None if it is no norm.

    Example:
        >>> find(nn.GroupNorm(2, 4)).handler.family
        'group'
        >>> find(nn.Linear(2, 2)) is None
        True
    """
    for cls in type(module).__mro__:
        found = _TABLE.get(class_name(cls))
        if isinstance(found, Entry):
            return _accept(module, cls, found)
        if found is not None:
            return found
    return _suspect(module)


def _accept(module: nn.Module, cls: type, entry: Entry) -> Entry | Refusal:
    own_call = type(module).__call__ is not nn.Module.__call__
    if own_call or type(module).forward is not cls.forward or "forward" in vars(module):  # type: ignore[attr-defined]
        return Refusal(
            "custom-forward",
            f"{type(module).__name__} overrides the {'call' if own_call else 'forward'} of {cls.__name__}, so what it "
            "computes is not known; register the class with ilmconvert.norms.register to convert it",
        )
    computed = [name for name in ("weight", "bias") if isinstance(vars(module).get(name), Tensor)]
    if computed or (hasattr(module, "parametrizations") and not _movable(module, entry.handler)):
        return Refusal("parametrized", "its weight or bias is computed (parametrized, pruned or weight-normalized)")
    if any(getattr(type(module), name) is not getattr(cls, name) for name in _STATE_METHODS) or _has_state_hooks(
        module
    ):
        return Refusal(
            "custom-state-dict",
            f"{type(module).__name__} saves or loads its state in a way of its own, by methods or hooks, which an ILM "
            "layer would lose; register the class with ilmconvert.norms.register, or remove the hooks, to convert it",
        )
    own = {name for name, t in (*module._parameters.items(), *module._buffers.items()) if t is not None} - _TENSORS
    own |= {name for name, _ in module.named_parameters() if "." in name and not name.startswith(_PARTS)}
    if own and (type(module) is not cls or cls.__module__.startswith("torch.")):
        return Refusal(
            "own-tensors",
            f"it holds {', '.join(sorted(own))} besides what {cls.__name__} has, which an ILM layer would lose; "
            "register the class with ilmconvert.norms.register to convert it",
        )
    return entry


def _has_state_hooks(module: nn.Module) -> bool:
    """Of the user's: those of torch belong to parametrizations."""
    hooks = (hook for table in _STATE_HOOKS for hook in vars(module).get(table, {}).values())
    return any(not str(getattr(hook, "hook", hook).__module__).startswith("torch.") for hook in hooks)


def _movable(module: nn.Module, handler: NormHandler) -> bool:
    """Whether a parametrized norm's ILM layer can compute its scale and shift likewise: they must be the norm's own."""
    names = set(module.parametrizations)  # type: ignore[arg-type]
    own = type(handler).affine is NormHandler.affine and handler.describe(module).preserves
    return own and names <= {"weight", "bias"}


def _suspect(module: nn.Module) -> Refusal | None:
    """A class of unknown origin that calls itself a norm is reported, not passed over.

    What holds norms or layers with matrices of weights, or is such a layer, is no norm itself, only named after one.
    """
    name = type(module).__name__
    if "norm" not in name.lower() or name.lstrip("_").startswith(_NEVER_NORMS) or isinstance(module, _WITH_MATRIX):
        return None
    inner = [m for m in module.modules() if m is not module]
    if any(find(m) or any(p.ndim > 1 for p in m.parameters(False)) for m in inner):
        return None
    return Refusal(
        "unknown-norm",
        f"{class_name(type(module))} is not a known norm class; ilmconvert.norms.register makes it one",
    )
