"""Convert one model and hold the result to everything a conversion promises."""

from __future__ import annotations

import gc
import logging
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ilmconvert.conversion import Conversion, apply_plan, convert
from ilmconvert.graph import Inputs
from ilmconvert.graph.tracer import FUNCTIONAL_NORMS
from ilmconvert.nn import ILMNorm
from ilmconvert.plan import Plan
from ilmconvert.survey.libraries import Library, library
from ilmconvert.survey.passes import Pass, perturb_norms, run_pass
from ilmconvert.survey.records import Record, Tensors
from ilmconvert.survey.walk import norm_like
from ilmconvert.verification import relative_difference
from ilmconvert.wording import brief

if TYPE_CHECKING:
    from ilmconvert.survey.run import SurveyOptions

__all__ = ["Task", "examine"]

TOLERANCE = 1e-5


@dataclass(frozen=True)
class Task:
    """One model to examine."""

    library: str
    name: str
    tensors: Tensors
    options: SurveyOptions


@dataclass
class _Notes:
    """What the record will say, filled step by step, so that a failure keeps what was known."""

    seconds: dict[str, float] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @contextmanager
    def timed(self, step: str) -> Iterator[None]:
        start = time.process_time()  # of this process, so that others on the same cores do not count
        try:
            yield
        finally:
            self.seconds[step] = round(time.process_time() - start, 4)

    def expect(self, holds: bool, problem: str) -> None:
        if not holds:
            self.problems.append(problem)


class _LeftOutError(Exception):
    """The survey was not to take this model; the message says why."""


def examine(task: Task) -> Record:
    """Build, convert and check one model; whatever goes wrong is in the record."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    _warm_up()
    gc.collect()  # what the last model left is not this one's cost
    notes = _Notes()
    status, reason, trace = "ok", None, None
    try:
        _examine(task, notes)
    except _LeftOutError as error:
        status, reason = "left out", str(error)
    except Exception as error:  # a model may raise anything; the record keeps it
        status, trace = "failed", traceback.format_exc()[-4000:]
        reason = brief(error)
    if status == "ok" and notes.problems:
        status, reason = "failed", notes.problems[0]
    record = Record(task.library, task.name, task.tensors, status, reason, trace)  # type: ignore[arg-type]
    return replace(record, **notes.facts, problems=tuple(notes.problems), seconds=notes.seconds, memory=_peak_memory())


@cache
def _warm_up() -> None:
    """Once in a process: the first conversion, forward and backward import and set up what later ones find there."""
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.GroupNorm(2, 8), nn.GELU())
    x = torch.zeros(2, 3, 4, 4)
    for example in (None, x):
        convert(model, example_inputs=example).model(x).sum().backward()


def _examine(task: Task, notes: _Notes) -> None:
    source = library(task.library)
    real = task.tensors == "real" or source.needs_values(task.name)
    notes.facts["tensors"] = "real" if real else "meta"
    _check_size(task, source)
    torch.manual_seed(0)
    with notes.timed("build"), torch.device("cpu" if real else "meta"):
        model = source.build(task.name)
    inputs = source.inputs(task.name, model, task.options.batch_size, training=False)
    if real:
        perturb_norms(model)
    model.eval()
    with notes.timed("convert"):
        conversion = convert(model, example_inputs=inputs)
    _describe(model, conversion, notes)
    if task.options.exact_only and not conversion.report.exact:
        raise _LeftOutError("it has norms that do not convert exactly")
    with notes.timed("check"):
        _account(model, conversion, notes)
        _compare(model, conversion, inputs, notes, real=real)
        _reload(model, conversion, notes)
        training = source.inputs(task.name, model, task.options.batch_size, training=True)
        _train(model, conversion.model, training, notes, real=real)


def _check_size(task: Task, source: Library) -> None:
    if task.options.max_parameters is None:
        return
    with torch.device("cpu" if source.needs_values(task.name) else "meta"):
        size = sum(p.numel() for p in source.build(task.name).parameters())
    if size > task.options.max_parameters:
        raise _LeftOutError(f"{size:,} parameters, more than the {task.options.max_parameters:,} asked for")


def _describe(model: nn.Module, conversion: Conversion, notes: _Notes) -> None:
    report = conversion.report
    notes.facts.update(
        model=type(model).__name__,
        parameters=report.parameters,
        added_parameters=report.added_parameters,
        converted=dict(Counter(d.norm for d in report.converted)),
        skipped=dict(Counter(f"{d.norm}: {d.code}" for d in report.skipped)),
        calls=sum(d.site.norm in FUNCTIONAL_NORMS.values() for d in report.plan.decisions),
        exact=report.exact,
        whole="" not in report.plan.untraced,
        untraced=len(report.plan.untraced),
        trace_error=report.plan.untraced.get(""),
    )


def _account(model: nn.Module, conversion: Conversion, notes: _Notes) -> None:
    """Each module that looks like a norm must be in a decision, and the converted model must be as decided."""
    seen = norm_like(model)
    decisions = {path: d for d in conversion.plan.decisions for path in d.site.paths}
    paths = set(decisions)
    unaccounted = [p for p in seen if p not in paths and not any(p.startswith(f"{q}.") for q in paths)]
    after = dict(conversion.model.named_modules(remove_duplicate=False))
    for path, decision in decisions.items():
        if path in seen:
            held = after.get(path)
            as_decided = isinstance(held, ILMNorm) == (decision.action == "convert") and held is not None
            unaccounted += [] if as_decided else [path]
    left = [p for p in norm_like(conversion.model) if not isinstance(after[p], ILMNorm)]
    skipped = {path for path, d in decisions.items() if d.action == "skip"}
    unaccounted += [p for p in left if p not in skipped and p not in unaccounted]
    modules = {id(m) for p, m in model.named_modules(remove_duplicate=False) if p in seen}
    notes.facts.update(norms=len(modules), unaccounted=tuple(unaccounted))
    notes.expect(not unaccounted, f"norms not accounted for: {', '.join(unaccounted[:5])}")


def _compare(model: nn.Module, conversion: Conversion, inputs: Inputs, notes: _Notes, *, real: bool) -> None:
    """Outputs and what goes in and out of each site, before and after, in evaluation mode."""
    paths = [d.path for d in conversion.plan.converted if d.site.call is None]
    counts_vary = real and not conversion.report.exact  # a detector with other values finds another number of boxes
    with torch.no_grad():
        before = run_pass(model, inputs, paths, lengths=not counts_vary)
        after = run_pass(conversion.model, inputs, paths, lengths=not counts_vary)
    notes.expect(before.shapes == after.shapes, f"output shapes {before.shapes} became {after.shapes}")
    other = [p for p in paths if before.sites.get(p) != after.sites.get(p)]
    notes.expect(not other, f"shapes at sites changed: {', '.join(other[:5])}")
    if real:
        _compare_values(before, after, conversion, notes)


def _compare_values(before: Pass, after: Pass, conversion: Conversion, notes: _Notes) -> None:
    difference = relative_difference(before.outputs, after.outputs)
    notes.facts.update(difference=difference if difference < float("inf") else None, finite=after.finite)
    notes.expect(after.finite, "outputs are not finite")
    if conversion.report.exact:
        notes.expect(difference <= TOLERANCE, f"outputs differ by {difference:.2e}")


def _reload(model: nn.Module, conversion: Conversion, notes: _Notes) -> None:
    """The plan, through JSON, on a fresh copy gives a model that takes the state dict strictly."""
    again = apply_plan(model, Plan.from_json(conversion.plan.to_json())).model
    state = conversion.model.state_dict()
    again.load_state_dict(state, strict=True, assign=next(iter(state.values())).is_meta if state else False)
    notes.expect(list(again.state_dict()) == list(state), "the state dict's names changed in a reload")


def _train(original: nn.Module, model: nn.Module, inputs: Inputs, notes: _Notes, *, real: bool) -> None:
    """Forward and backward in training mode: each ILM layer that ran must get gradients if its norm did."""
    layers = {name: m for name, m in model.named_modules() if isinstance(m, ILMNorm)}
    done = run_pass(model.train(), inputs, list(layers))
    done.loss().backward()
    ran = [name for name in layers if name in done.sites]
    trained = [name for name in ran if all(p.grad is not None for p in layers[name].parameters() if p.requires_grad)]
    notes.facts.update(ran=len(ran), trained=len(trained))
    lost = _trained_in(original, inputs, set(ran) - set(trained))
    notes.expect(not lost, f"layers without gradients, whose norms had some: {', '.join(lost[:5])}")
    if real:
        bad = [n for n, p in model.named_parameters() if p.grad is not None and not torch.isfinite(p.grad).all()]
        notes.facts["finite"] = notes.facts["finite"] and not bad
        notes.expect(not bad, f"gradients are not finite: {', '.join(bad[:5])}")


def _trained_in(model: nn.Module, inputs: Inputs, paths: set[str]) -> list[str]:
    """Which of the norms at ``paths`` get gradients; where the output does not depend on one, none does."""
    if not paths:
        return []
    run_pass(model.train(), inputs, []).loss().backward()
    norms = {path: m for path, m in model.named_modules() if path in paths}
    return sorted(path for path, m in norms.items() if any(p.grad is not None for p in m.parameters(recurse=False)))


def _peak_memory() -> int:
    if sys.platform == "win32":
        return 0
    import resource

    unit = 1e6 if sys.platform == "darwin" else 1e3
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit)
