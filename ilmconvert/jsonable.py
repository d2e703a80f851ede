"""Plain data as JSON, and frozen dataclasses from the plain data that ``json.loads(json.dumps(asdict(value)))`` gives.

The reader is strict, so that an edited plan with a typing error is refused rather than half understood.
"""

from __future__ import annotations

import json
import math
import types
from dataclasses import fields, is_dataclass
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from ilmconvert.errors import PlanError

__all__ = ["from_data", "parse_json", "to_json"]

T = TypeVar("T")


def from_data(cls: type[T], data: Any, where: str) -> T:
    """Build a dataclass from plain data.

    Args:
        cls: a dataclass of numbers, strings, tuples, dicts, optional values and further such dataclasses.
        data: what was read.
        where: names the value in errors.

    Raises:
        PlanError: unknown or missing fields, or a value of another type.
    """
    hints = get_type_hints(cls)
    names = [f.name for f in fields(cls) if f.init]  # type: ignore[arg-type]
    if not isinstance(data, dict):
        raise PlanError(f"expected {where} to be an object with {', '.join(names)}; got {data!r}")
    if wrong := sorted(set(data) - set(names)):
        raise PlanError(f"expected {where} to have only {', '.join(names)}; got {', '.join(wrong)}")
    values = {name: _value(hints[name], value, f"{where}.{name}") for name, value in data.items()}
    try:
        return cls(**values)
    except (TypeError, ValueError) as error:
        raise PlanError(f"expected {where} to be complete and valid: {error}") from error


def parse_json(text: str) -> Any:
    """Plain data from JSON text.

    Raises:
        ValueError: it is none, or nested deeper than Python can follow.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def to_json(data: Any, indent: int | None = 1) -> str:
    """Plain data as JSON text that every parser reads: numbers that are not finite become null.

    Example:
        >>> to_json({"kl": float("nan"), "steps": [1, 2.5]}, indent=None)
        '{"kl": null, "steps": [1, 2.5]}'
    """
    return json.dumps(_finite(data), indent=indent, allow_nan=False)


def _finite(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def _value(hint: Any, data: Any, where: str) -> Any:
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        inner = next(a for a in args if a is not type(None))
        return None if data is None else _value(inner, data, where)
    if is_dataclass(hint):
        return from_data(hint, data, where)  # type: ignore[arg-type]
    if origin is tuple and isinstance(data, (list, tuple)):
        return tuple(_value(args[0], item, f"{where}[{i}]") for i, item in enumerate(data))
    if origin is dict and isinstance(data, dict):
        return {key: _value(args[1], item, f"{where}[{key!r}]") for key, item in data.items()}
    return _scalar(hint, data, where)


def _scalar(hint: Any, data: Any, where: str) -> Any:
    if get_origin(hint) is Literal:
        if data in get_args(hint):
            return data
        raise PlanError(f"expected {where} to be one of {', '.join(map(repr, get_args(hint)))}; got {data!r}")
    if hint is float and type(data) is int:
        return float(data)
    if type(data) is not hint:
        raise PlanError(f"expected {where} to be {getattr(hint, '__name__', hint)}, got {data!r}")
    return data
