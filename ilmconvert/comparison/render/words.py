"""What several renderers say in the same words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import takewhile

from ilmconvert.comparison.nodes import Node, TensorInfo
from ilmconvert.comparison.value import FieldChange, GraphDiff, Row

__all__ = [
    "MARKS",
    "class_change",
    "counts_line",
    "cut",
    "differences",
    "frequent",
    "mark",
    "numbers",
    "outputs",
    "parameters_below",
    "printable",
    "state_dict",
    "subtrees",
    "tensor",
    "totals",
]

MARKS = {"inserted": "+", "removed": "-", "changed": "~", "moved": ">", "renamed": "="}
_LABELS = {"num_groups": "groups", "num_key_groups": "key groups"}
_LONGEST = 200  # characters of a value that are shown
_BEFORE = 20  # characters that are shown before a difference in a longer one


def mark(row: Row) -> str:
    """One sign for what happened to a row; blank if nothing did."""
    return MARKS[row.changes[0]] if row.changes else " "


def printable(text: str) -> str:
    r"""The text in one line, with what cannot be printed as an escape.

    Example:
        >>> printable("a\nb\x1b[31m\u202e")
        'a\\nb\\x1b[31m\\u202e'
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def class_change(diff: GraphDiff, row: Row) -> str:
    """``Conv2d``, or ``BatchNorm2d -> ILMNorm``; a call with its arguments."""
    return _classes(diff, row, lambda n: f"({cut(n.attributes.get('arguments', ''))})" if n.kind == "call" else "")


def _classes(diff: GraphDiff, row: Row, more: Callable[[Node], str] = lambda _: "") -> str:
    """Short names, or qualified ones where only these tell two classes apart."""
    nodes = [n for n in diff.nodes(row) if n is not None]
    alike = len({n.class_name for n in nodes}) < len({n.cls for n in nodes})
    names = [(n.cls if alike else n.class_name) + more(n) for n in nodes]
    return printable(" -> ".join(dict.fromkeys(names)))


def differences(diff: GraphDiff) -> dict[int, list[str]]:
    """The lines below each row, by index; several that were told before are told as those of an earlier row."""
    told: dict[tuple[str, ...], str] = {}
    result = {}
    for index, row in enumerate(diff.rows):
        lines = _details(diff, row)
        known = told.setdefault(tuple(lines), printable(row.path)) if len(lines) > 1 else ""
        result[index] = _origin(row) + ([f"as {known}"] if known and known != printable(row.path) else lines)
    return result


def _origin(row: Row) -> list[str]:
    if row.before is None or row.after is None or not {"moved", "renamed"} & set(row.changes):
        return []
    return [printable(f"was {row.before or '(the model)'}")]


def _details(diff: GraphDiff, row: Row) -> list[str]:
    """The differences of a changed pair, in few lines: what differs, what is new, what is gone, tensors likewise."""
    plain = [f for f in row.fields if f.group in ("attribute", "graph") or f.name == "kind"]
    tensors = [f for f in row.fields if f.group in ("parameter", "buffer")]
    lines = [_kept(diff, row)] if row.fields and row.fields[0].group == "class" else []
    lines += [_both(f) for f in plain if f.before is not None and f.after is not None]
    added = sorted((f for f in plain if f.before is None), key=lambda f: f.name not in _LABELS)
    lines.append(_list("now ", [f"{_label(f)} {cut(f.after or '')}" for f in added]))
    lines.append(_list("no longer ", [_label(f) for f in plain if f.after is None]))
    lines += [f"{f.name} {f.before} -> {f.after}" for f in tensors if f.before is not None and f.after is not None]
    lines.append(_list("new ", [f"{f.name} {f.after}" for f in tensors if f.before is None]))
    lines.append(_list("lost ", [f"{f.name} {f.before}" for f in tensors if f.after is None]))
    return [printable(line) for line in lines if line]


def _kept(diff: GraphDiff, row: Row) -> str:
    """What a norm that became another layer has kept of its own: eps and groups, which one looks for."""
    a, b = diff.nodes(row)
    if a is None or b is None or not (a.role and b.role):
        return ""
    same = [n for n in ("num_groups", "eps") if n in a.attributes and a.attributes[n] == b.attributes.get(n)]
    return _list("still ", [f"{_LABELS.get(n, n)} {a.attributes[n]}" for n in same])


def _both(field: FieldChange) -> str:
    """``eps 1e-05 -> 1e-06``; of long values, from where they differ."""
    before, after = field.before or "", field.after or ""
    if max(len(before), len(after)) > _LONGEST:
        same = takewhile(lambda pair: pair[0] == pair[1], zip(before, after, strict=False))
        start = max(sum(1 for _ in same) - _BEFORE, 0)
        before, after = (f"{'...' if start else ''}{cut(text[start:])}" for text in (before, after))
    return f"{_label(field)} {before} -> {after}"


def cut(text: str, longest: int = _LONGEST) -> str:
    """The text, or its beginning and three dots."""
    return text if len(text) <= longest else f"{text[: longest - 3]}..."


def _label(field: FieldChange) -> str:
    return _LABELS.get(field.name, field.name)


def _list(start: str, items: list[str]) -> str:
    return start + ", ".join(items) if items else ""


def counts_line(diff: GraphDiff) -> str:
    """``20 changed, 82 unchanged``."""
    return ", ".join(f"{n:,} {kind}" for kind, n in diff.counts.items() if n or kind == "unchanged")


def state_dict(diff: GraphDiff) -> str:
    """``39 keys added, 0 removed, 0 renamed``."""
    added, removed, renamed = (
        sum(len(getattr(row, name)) for row in diff.rows) for name in ("keys_added", "keys_removed", "keys_renamed")
    )
    return f"{added:,} keys added, {removed:,} removed, {renamed:,} renamed"


def totals(diff: GraphDiff) -> list[tuple[str, str, str, str]]:
    """(what, before, after, difference) of what the models cost; the difference is empty where there is none."""
    a, b = diff.before.totals, diff.after.totals
    rows = [
        ("parameters", a.parameters, b.parameters, ""),
        ("MACs", a.macs, b.macs, " "),
        ("parameters and buffers", a.parameter_bytes, b.parameter_bytes, "B"),
        ("activations", a.activation_bytes, b.activation_bytes, "B"),
    ]
    return [
        (what, _amount(x, max(x, y), unit), _amount(y, max(x, y), unit), _difference(x, y, unit))
        for what, x, y, unit in rows
        if x is not None and y is not None
    ]


def _amount(number: int, largest: int, unit: str) -> str:
    """A count in full, or an amount with the prefix that suits the largest to be compared with."""
    if not unit:
        return f"{number:,}"
    power = min((len(str(largest)) - 1) // 3, 4)
    return f"{number / 1000**power:,.{3 if power else 0}f} {('', 'k', 'M', 'G', 'T')[power]}{unit}".rstrip()


def _difference(before: int, after: int, unit: str) -> str:
    """In percent, or as a number where that would say nothing."""
    if before == after:
        return ""
    percent = f"{100 * (after - before) / before:+.2f}" if before else ""
    return f"{percent} %" if percent.strip("+-0.") else f"{after - before:+,} {unit}".rstrip()


def frequent(diff: GraphDiff) -> list[tuple[str, int]]:
    """What happened, most frequent first: ``changed BatchNorm2d -> ILMNorm``, how often."""
    counted = Counter(f"{' and '.join(row.changes)} {_classes(diff, row)}" for row in diff.changed)
    return counted.most_common()


def outputs(diff: GraphDiff) -> str:
    """How far the models' own outputs are apart: the figures of the topmost pair."""
    return next((text for row in diff.rows if (text := numbers(row))), "not compared")


def numbers(row: Row) -> str:
    """``error 1.2e-07, cosine 1.000000``; empty without numerics."""
    if row.numbers is None:
        return ""
    error, cosine = row.numbers.relative_error, row.numbers.cosine
    if error is None:
        return f"error: {row.numbers.note}"
    return f"error {error:.1e}" + ("" if cosine is None else f", cosine {cosine:.6f}")


def subtrees(diff: GraphDiff) -> tuple[list[bool], list[int]]:
    """Whether anything changed in each row or below it, and how many rows that are."""
    changed = [bool(row.changes) for row in diff.rows]
    sizes = [1] * len(changed)
    for index in reversed(range(len(changed))):
        parent = diff.rows[index].parent
        if parent is not None:
            changed[parent] |= changed[index]
            sizes[parent] += sizes[index]
    return changed, sizes


def parameters_below(diff: GraphDiff, index: int) -> int:
    """Parameters of an inserted or removed row and of all below it."""
    a, b = diff.nodes(diff.rows[index])
    node = b or a
    own = node.parameters if node else 0
    return own + sum(parameters_below(diff, i) for i in diff.children.get(index, ()))


def tensor(info: TensorInfo) -> str:
    """``weight float32[64]``."""
    return printable(f"{info.name} {info}")
