"""Where two models part: both on the same inputs, the results of matched modules and calls compared as they run.

No more than a budget of activations is ever held: the first model runs and keeps what fits, the second runs and each
output is compared and dropped at once; both run again for the next ones until all are compared. Modules are seen by
hooks, function calls in runs of their own along the traced graphs. Inputs come in batches, over which only a few sums
for each node are kept::

    relative error = |a - b| / |a|        cosine = <a, b> / (|a| |b|)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ilmconvert.comparison.batches import Batches
from ilmconvert.comparison.calls import Calls
from ilmconvert.comparison.following import followed, traced_calls
from ilmconvert.comparison.value import GraphDiff, Numbers, NumericsRun
from ilmconvert.errors import IlmconvertError, UsageError
from ilmconvert.graph.inputs import Inputs, same_noise, tensors_in
from ilmconvert.graph.shadow import copy_model
from ilmconvert.options import Progress
from ilmconvert.wording import brief

__all__ = ["BUDGET", "measure"]

BUDGET = 256 * 2**20  # bytes of activations held at a time

_Take = Callable[[int, list[Tensor]], None]
_Run = Callable[[dict[str, int], Inputs, _Take, str], None]


@dataclass
class _Sums:
    """The sums of one pair over all calls and batches."""

    aa: float = 0.0
    bb: float = 0.0
    ab: float = 0.0
    error: float = 0.0
    note: str = "did not run"

    def add(self, a: Tensor, b: Tensor) -> None:
        x, y = a.double().flatten(), b.double().flatten()
        self.aa += float(x @ x)
        self.bb += float(y @ y)
        self.ab += float(x @ y)
        y = y - x
        self.error += float(y @ y)

    def numbers(self) -> Numbers:
        if self.note:
            return Numbers(None, None, self.note)
        if not math.isfinite(self.aa + self.bb + self.error):
            return Numbers(None, None, "not finite")
        cosine = self.ab / math.sqrt(self.aa * self.bb) if self.aa and self.bb else None
        if cosine is not None:
            cosine = min(1.0, max(-1.0, cosine))
        if not self.aa:
            return Numbers(None if self.error else 0.0, cosine, "the first is zero" if self.error else "")
        return Numbers(math.sqrt(self.error / self.aa), cosine)


@dataclass
class _Pass:
    """One run of each model: what of the first is held, and what did not fit any more."""

    budget: int
    waiting: set[int]
    held: dict[int, list[list[Tensor]]] = field(default_factory=dict)
    used: int = 0
    full: bool = False

    def keep(self, index: int, tensors: list[Tensor]) -> None:
        if index not in self.waiting or (self.full and index not in self.held):
            return
        size = sum(t.numel() * t.element_size() for t in tensors)
        if self.held and index not in self.held and self.used + size > self.budget:
            self.full = True
            return
        self.used += size
        self.held.setdefault(index, []).append([t.detach().clone() for t in tensors])  # it may be changed in place


def measure(
    diff: GraphDiff,
    a: nn.Module,
    b: nn.Module,
    batches: Batches,
    *,
    budget: int = BUDGET,
    progress: Progress | None = None,
) -> GraphDiff:
    """Add figures to the matched nodes of ``diff``.

    Args:
        diff: of the two models.
        a, b: the models; they are left as they are, and run in evaluation mode.
        batches: what to call both with.
        budget: bytes of activations to hold at a time (one output at least).
        progress: called with (what, done, total), where total is 0 if unknown.

    Raises:
        IlmconvertError: a model cannot be run on these inputs.
    """
    sums: dict[bool, dict[int, _Sums]] = {True: {}, False: {}}
    for i, (row, (x, _)) in enumerate(zip(diff.rows, map(diff.nodes, diff.rows), strict=True)):
        if row.before is not None and row.after is not None and x is not None:
            sums[x.kind == "call"][i] = _Sums()
    models = [copy_model(m).eval() for m in (a, b)]
    calls = [traced_calls(m) for m in models] if sums[True] else []
    samples = 0
    for number, batch in enumerate(batches.batches):
        if progress is not None:
            progress("comparing activations", number, batches.total)
        samples += _samples(batch)
        _batch(diff, [_by_hooks(m) for m in models], batch, sums[False], budget)
        if calls:
            _batch(diff, [_along(m, c) for m, c in zip(models, calls, strict=True)], batch, sums[True], budget)
    if not samples:
        raise UsageError(f"expected inputs to compare activations on, got none: {batches.words()}")
    rows = list(diff.rows)
    for i, found in (sums[False] | sums[True]).items():
        rows[i] = replace(rows[i], numbers=found.numbers())
    return replace(diff, rows=tuple(rows), numerics=NumericsRun(batches.words(), samples, batches.notes()))


@torch.no_grad()
def _batch(diff: GraphDiff, runs: list[_Run], batch: Inputs, sums: dict[int, _Sums], budget: int) -> None:
    waiting = set(sums)
    while waiting:
        this = _Pass(budget, waiting)
        before = {diff.rows[i].before or "": i for i in waiting}
        runs[0](before, batch, this.keep, diff.before.name)
        seen = dict.fromkeys(this.held, 0)

        def compare(index: int, tensors: list[Tensor], this: _Pass = this, seen: dict[int, int] = seen) -> None:
            if index in this.held:
                kept = this.held[index]
                sums[index].note = _compare(sums[index], kept.pop(0) if kept else None, tensors)
                seen[index] += 1

        runs[1]({diff.rows[i].after or "": i for i in this.held}, batch, compare, diff.after.name)
        for index, kept in this.held.items():
            if kept:
                sums[index].note = f"the second runs it {seen[index]} times, the first {seen[index] + len(kept)}"
        waiting = waiting - set(this.held) if this.full else set()


def _compare(sums: _Sums, before: list[Tensor] | None, after: list[Tensor]) -> str:
    """Add one call; returns why it cannot be compared, or an empty text."""
    if sums.note not in ("", "did not run"):
        return sums.note
    if before is None:
        return "the second runs it more often"
    shapes = [[tuple(t.shape) for t in group] for group in (before, after)]
    if shapes[0] != shapes[1]:
        return f"shapes {_show(shapes[0])} and {_show(shapes[1])}"
    for x, y in zip(before, after, strict=True):
        sums.add(x, y)
    return "" if before else "no tensor in its output"


def _show(shapes: list[tuple[int, ...]]) -> str:
    return ", ".join(map(str, shapes)) or "none"


def _by_hooks(model: nn.Module) -> _Run:
    """Run a model and hand over what modules return."""

    def run(indexes: dict[str, int], batch: Inputs, take: _Take, who: str) -> None:
        with ExitStack() as stack:
            for path, index in indexes.items():

                def hook(_: nn.Module, __: Any, output: Any, index: int = index) -> None:
                    take(index, _floats(output))

                stack.callback(model.get_submodule(path).register_forward_hook(hook).remove)
            _run(model, batch, who)

    return run


def _along(model: nn.Module, calls: Calls) -> _Run:
    """Run a model along its graphs and hand over what function calls return."""

    def run(indexes: dict[str, int], batch: Inputs, take: _Take, who: str) -> None:
        def seen(path: str, result: Any) -> None:
            if path in indexes:
                take(indexes[path], _floats(result))

        with followed(model, calls, seen):
            _run(model, batch, who)

    return run


def _floats(output: Any) -> list[Tensor]:
    return [t for t in tensors_in(output) if t.is_floating_point()]


def _run(model: nn.Module, batch: Inputs, who: str) -> None:
    with same_noise():
        try:
            batch.suited(model)(model)
        except Exception as error:
            raise IlmconvertError(
                f"{who} cannot be run on these inputs: {brief(error)}. Both models take the same inputs; "
                "--input-size gives another size"
            ) from error


def _samples(batch: Inputs) -> int:
    return next((len(t) for t in batch.tensors() if t.ndim), 1)
