"""What the user may choose, checked once."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from ilmconvert.errors import UsageError
from ilmconvert.nn.ilm_norm import Mode

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["FAMILIES", "BatchTarget", "ConvertOptions", "Options", "Progress"]

Progress = Callable[[str, int, int], None]  # called with (what, done, total)
BatchTarget = Literal["layer", "group", "instance"]
FAMILIES = ("batch", "group", "instance", "layer", "rms")


class Options:
    """A dataclass of options that a function takes as one value or by keyword."""

    EXAMPLE: ClassVar[str]  # keywords, for an error

    @classmethod
    def of(cls, options: Self | None, given: dict[str, Any]) -> Self:
        """An options value from one, or from keyword fields.

        Raises:
            UsageError: both are given, a keyword is not an option, or ``options`` is something else.
        """
        if not isinstance(options, (cls, type(None))):
            raise UsageError(
                f"expected {cls.__name__}, or options by keyword ({cls.EXAMPLE}), got {type(options).__name__}"
            )
        known = [f.name for f in fields(cls)]  # type: ignore[arg-type]
        if wrong := sorted(set(given) - set(known)):
            raise UsageError(f"expected options among {', '.join(known)}; got {', '.join(wrong)}")
        if options is not None and given:
            raise UsageError(f"expected options or keyword fields, got both; put the fields into the {cls.__name__}")
        return options if options is not None else cls(**given)


@dataclass(frozen=True)
class ConvertOptions(Options):
    """How to convert; the defaults start closest to the model.

    Attributes:
        bn_to: the grouping that replaces batch statistics: one group per sample (``layer``), ``group``, or one group
            per channel (``instance``).
        num_groups: groups for ``bn_to="group"``; 32 if neither this nor ``group_size`` is given.
        group_size: channels per group for ``bn_to="group"``, instead of ``num_groups``.
        key_group_size: channels per key group of the predictor. None is 16, as in the paper, except for Batch Norm in
            mode ``preserve``: there each norm group is a key group, so that the layer can start as the norm.
        reduction: key groups per unit of the predictor's embedding. None is 16, as in the paper, except for Batch Norm
            in mode ``preserve``: there each key group has two units.
        mode: ``preserve`` starts from the model's function, ``paper`` from the authors' initialisation and formula.
        gains: learn factors on the predictions (an extension of the paper). None is for Batch Norm in mode
            ``preserve`` only.
        include: convert only sites whose path matches one of these shell patterns.
        exclude: leave sites whose path matches one of these shell patterns.
        norms: convert only these families (batch, group, instance, layer, rms) or class names.
        skip_norms: leave these families or class names.

    Raises:
        UsageError: a value out of range, or options that contradict each other.

    Example:
        >>> ConvertOptions(bn_to="group", group_size=16).bn_to
        'group'
    """

    EXAMPLE = "bn_to='group', example_inputs=x"

    bn_to: BatchTarget = "layer"
    num_groups: int | None = None
    group_size: int | None = None
    key_group_size: int | None = None
    reduction: int | None = None
    mode: Mode = "preserve"
    gains: bool | None = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    norms: tuple[str, ...] = ()
    skip_norms: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("include", "exclude", "norms", "skip_norms"):
            object.__setattr__(self, name, _strings(name, getattr(self, name)))
        _one_of("bn_to", self.bn_to, get_args(BatchTarget))
        _one_of("mode", self.mode, get_args(Mode))
        if not isinstance(self.gains, (bool, type(None))):
            raise UsageError(f"expected gains to be True, False or None, got {self.gains!r}")
        for name in ("num_groups", "group_size", "key_group_size", "reduction"):
            _positive(name, getattr(self, name))
        if self.num_groups and self.group_size:
            raise UsageError("expected num_groups or group_size, got both; give one of them")
        if self.bn_to != "group" and (self.num_groups or self.group_size):
            raise UsageError(
                f"num_groups and group_size choose the groups for bn_to='group', but bn_to is {self.bn_to!r}; "
                "set bn_to='group' (--bn-to group) or leave them out"
            )


def _one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UsageError(f"expected {name} to be one of {', '.join(allowed)}; got {value!r}")


def _strings(name: str, value: object) -> tuple[str, ...]:
    values = (value,) if isinstance(value, str) else value
    if not isinstance(values, Iterable) or not all(isinstance(v, str) for v in values):
        raise UsageError(f"expected {name} to be a string or several, got {value!r}")
    return tuple(values)


def _positive(name: str, value: object) -> None:
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        raise UsageError(f"expected {name} to be a positive integer, got {value!r}")
