"""The few turns of phrase that messages and reports share."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["brief", "one_line", "plural", "some"]


def plural(number: int, noun: str) -> str:
    """``1 norm``, ``2 norms``."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def some(names: Iterable[str], most: int = 3) -> str:
    """The first names, and how many more there are.

    Example:
        >>> some("abcde")
        'a, b, c and 2 more'
    """
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def one_line(error: object, most: int | None = 300) -> str:
    """The beginning of an error's message, or all of it for None, in one line."""
    return " ".join(str(error).split())[:most]


def brief(error: BaseException, most: int | None = 300) -> str:
    r"""An error's class, and the beginning of its message, in one line.

    Example:
        >>> brief(ValueError("no such\n  thing")), brief(KeyboardInterrupt())
        ('ValueError: no such thing', 'KeyboardInterrupt')
    """
    return ": ".join(filter(None, (type(error).__name__, one_line(error, most))))
