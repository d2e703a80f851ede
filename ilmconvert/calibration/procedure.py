"""Calibrate a converted model: two networks in lock-step, each layer fitted before anything runs behind it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ilmconvert.calibration.fitting import RIDGE, Samples, bare_norm, fit_
from ilmconvert.calibration.lockstep import Program, Visit, Walk, Walks
from ilmconvert.calibration.report import CalibrationReport, SiteCalibration
from ilmconvert.errors import ModelError, UsageError
from ilmconvert.finite import why_not_finite
from ilmconvert.graph.inputs import Inputs, check_model, example_inputs, first_tensor, same_noise
from ilmconvert.graph.shadow import copy_model
from ilmconvert.images import image_batches
from ilmconvert.metrics import Comparison, Similarity, logits_of
from ilmconvert.nn import ILMNorm
from ilmconvert.norms import Entry, find
from ilmconvert.options import Progress
from ilmconvert.wording import brief

__all__ = ["MEMORY", "Calibration", "calibrate"]

MEMORY = 2 << 30
_ROUNDING = 1e-7  # nats: a KL of float32 logits tells no less


@dataclass(frozen=True)
class Calibration:
    """A calibrated model and the account of it.

    Attributes:
        model: the calibrated copy of the converted model.
        report: site by site, and as a whole.
    """

    model: nn.Module
    report: CalibrationReport


@torch.inference_mode(False)
def calibrate(
    original: nn.Module,
    converted: nn.Module,
    batches: str | Path | Iterable[Any],
    *,
    held_out: str | Path | Iterable[Any] | None = None,
    memory: int = MEMORY,
    ridge: float = RIDGE,
    progress: Progress | None = None,
) -> Calibration:
    """Fit the layers that took the place of Batch Norms to what those norms give out, without labels or gradients.

    Both networks run in evaluation mode and in lock-step. At each layer, in execution order, weight, bias and gains are
    the least squares of the original norm's output on the layer's own terms (:mod:`ilmconvert.calibration.fitting`);
    the networks then go on from there, so that later layers correct what earlier ones left. A layer that runs several
    times is fitted to all its visits at once, on the original's activations. If the whole is further from the original
    than the start (by KL, on ``held_out``), the start is what is returned.

    Under ``torch.distributed`` each process brings its own batches; sums are added up, and all processes get the same
    result.

    Args:
        original: the model before the conversion; left as it is.
        converted: its conversion; left as it is.
        batches: inputs without labels: tensors ``(B, *)``, or tuples or dicts of arguments; or a folder of images, of
            which all are taken (:func:`ilmconvert.images.image_batches` takes some). The result does not depend on how
            the images are cut into batches.
        held_out: further batches, to compare the two models on; without them, they are compared on ``batches``.
        memory: bytes of activations to hold between two layers; what exceeds it waits on disk.
        ridge: how much the fit is pulled towards the start, as a share of each term's energy.
        progress: called with (what, done, total).

    Raises:
        UsageError: no batches, no folder, nothing to calibrate, or what is given is no model.
        ModelError: the two models do not run the same norms, return no logits, or give values that are not finite.

    Example:
        >>> import ilmconvert, torch
        >>> norm = torch.nn.BatchNorm2d(8)
        >>> original = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), norm, torch.nn.Flatten(), torch.nn.Linear(288, 5))
        >>> converted = ilmconvert.convert(original, gains=False).model
        >>> report = ilmconvert.calibrate(original, converted, torch.randn(6, 4, 3, 8, 8)).report
        >>> report.images, report.after.kl < report.before.kl
        (24, True)
    """
    for model in (original, converted):
        check_model(model)
    if not memory >= 0:
        raise UsageError(f"expected memory of at least 0 bytes, got {memory!r}")
    batches = _opened(batches, original)
    held_out = None if held_out is None else _opened(held_out, original)
    given = list(batches) if iter(batches) is batches else batches
    teacher, student = copy_model(original).eval(), copy_model(converted).eval()
    layers, left = _layers(teacher, student)
    if not layers:
        others = "; ".join(f"{path}: {reason}" for path, reason in list(left.items())[:3])
        raise UsageError(
            f"expected ILM layers that replaced norms with batch statistics, found none in {type(student).__name__}; "
            f"{others or 'layers that replaced other norms are exact already'}"
        )
    inputs = _Prepared(given, teacher)
    first = next(iter(inputs), None)
    if first is None:
        raise UsageError("expected batches to calibrate with, got none")
    _check_batch(teacher, first)
    programs = Program(teacher, layers, first), Program(student, layers, first)
    visits = _visits(programs, first)
    left |= {path: "it does not run in evaluation mode" for path in layers if path not in visits}
    before = _learned(layers)
    run = _Run(teacher, layers, visits, ridge, progress or (lambda *_: None))
    if run.repeated:
        with Walks(programs[:1], inputs, memory) as walks:
            run.fit_repeated(walks)
    with Walks(programs, inputs, memory) as walks:
        run.lockstep(walks)
    was, now = _compare(teacher, student, layers, before, inputs if held_out is None else _Prepared(held_out, teacher))
    worse = not now.kl <= was.kl + _ROUNDING
    if worse:
        _load(layers, before)
    report = CalibrationReport(
        tuple(run.sites),
        left,
        max((site.fit.images // site.visits for site in run.sites), default=0),
        held_out is not None,
        was,
        was if worse else now,
        now if worse else None,
        sum(p.numel() for p in student.parameters()) - sum(p.numel() for p in teacher.parameters()),
        walks.spilled,
    )
    for name, module in converted.named_modules():
        student.get_submodule(name).training = module.training
    return Calibration(student, report)


@torch.no_grad()
def _check_batch(model: nn.Module, batch: Inputs) -> None:
    try:
        with same_noise():
            output = batch(model)
    except Exception as error:  # a forward pass may raise anything
        shapes = ", ".join(str(tuple(v.shape)) for v in batch.args if isinstance(v, Tensor)) or "no tensors"
        raise UsageError(
            f"expected batches that {type(model).__name__} can be called with: tensors (B, *), or tuples or dicts of "
            f"arguments, without labels ((x for x, _ in loader)); the first, {shapes}, ends in {brief(error, 200)}"
        ) from error
    if not logits_of(output).isfinite().all():
        raise ModelError(
            f"expected an original with finite outputs, but those of {type(model).__name__} are not; "
            f"{why_not_finite(model)}"
        )


def _opened(batches: str | Path | Iterable[Any], model: nn.Module) -> Iterable[Any]:
    return image_batches(batches, model) if isinstance(batches, (str, Path)) else batches


class _Prepared:
    """Batches as inputs on the model's device; may be gone through again."""

    def __init__(self, batches: Iterable[Any], model: nn.Module) -> None:
        self._batches, self._model = batches, model

    def __iter__(self) -> Any:
        for batch in self._batches:
            inputs = example_inputs(self._model, batch)
            if inputs is not None:
                yield inputs.suited(self._model)


def _layers(teacher: nn.Module, student: nn.Module) -> tuple[dict[str, ILMNorm], dict[str, str]]:
    """The layers to fit, by path, and the others with the reason."""
    layers, left = {}, {}
    for path, layer in student.named_modules():
        if not isinstance(layer, ILMNorm):
            continue
        try:
            norm = teacher.get_submodule(path)
        except AttributeError:
            left[path] = "the original has no module there"
            continue
        entry = find(norm)
        if not isinstance(entry, Entry):
            left[path] = f"the original has {type(norm).__name__} there, which is no known norm"
        elif layer.mode != "paper" and entry.handler.describe(norm).preserves:
            continue
        elif len(layer.normalized_shape) > 1:
            left[path] = f"it has a scale for each of {layer.normalized_shape}, and channels alone can be fitted"
        else:
            layers[path] = layer
    return layers, left


def _visits(programs: Sequence[Program], inputs: Inputs) -> list[str]:
    """The paths of the norms in the order they run, the same for all programs."""
    orders = []
    for program in programs:
        walk, order = Walk(program, inputs), []
        while (visit := walk.advance()) is not None:
            order.append(visit.path)
        orders.append(order)
    if any(order != orders[0] for order in orders):
        raise ModelError(
            f"expected the two models to run the same norms in the same order; the original runs {len(orders[0])}, the "
            f"converted model {len(orders[-1])}. Give the original that was converted"
        )
    return orders[0]


class _Run:
    """The fits of one calibration."""

    def __init__(
        self,
        teacher: nn.Module,
        layers: dict[str, ILMNorm],
        visits: list[str],
        ridge: float,
        progress: Progress,
    ) -> None:
        self._norms = {path: bare_norm(teacher.get_submodule(path)) for path in layers}
        self._layers, self._visits, self._ridge, self._progress = layers, visits, ridge, progress
        self._count = Counter(visits)
        self.repeated = [path for path, count in self._count.items() if count > 1]
        self.sites: list[SiteCalibration] = []

    def fit_repeated(self, walks: Walks) -> None:
        """Fit the layers that run more than once, on all visits of the original."""
        samples = {path: Samples() for path in self.repeated}
        for path in self._visits:
            for (visit,) in walks.advance():
                if path in samples:
                    self._add(samples[path], path, visit, visit)
        for path, found in samples.items():
            self._fit(path, found)

    def lockstep(self, walks: Walks) -> None:
        """Fit the others, each on what the layers before it give."""
        total = len(self._visits)
        for done, path in enumerate(self._visits, start=1):
            samples, fits = Samples(), self._count[path] == 1
            for visit, ours in walks.advance():
                if fits:
                    self._add(samples, path, visit, ours)
            if fits:
                self._fit(path, samples)
            self._progress("calibrating", done, total)
        order = {path: i for i, path in reversed(list(enumerate(self._visits)))}
        self.sites.sort(key=lambda site: order[site.path])

    @torch.no_grad()
    def _add(self, samples: Samples, path: str, visit: Visit | None, ours: Visit | None) -> None:
        if visit is None or ours is None or {visit.path, ours.path} != {path}:
            raise ModelError(
                f"expected every batch to run the same norms; at {path!r} a batch runs "
                f"{'nothing' if visit is None else visit.path!r}. Give batches that take one way through the model"
            )
        samples.add(self._layers[path], ours.input, self._norms[path](visit.input))

    def _fit(self, path: str, samples: Samples) -> None:
        layer = self._layers[path]
        fit = fit_(layer, samples, ridge=self._ridge)
        self.sites.append(SiteCalibration(path, layer.num_channels, self._count[path], fit))


def _learned(layers: dict[str, ILMNorm]) -> dict[str, dict[str, Tensor]]:
    """What a fit changes: the layers' own tensors."""
    return {
        path: {n: t.detach().clone() for n, t in layer.state_dict().items() if not n.startswith(("act.", "drop."))}
        for path, layer in layers.items()
    }


def _load(layers: dict[str, ILMNorm], states: dict[str, dict[str, Tensor]]) -> None:
    for path, layer in layers.items():
        layer.load_state_dict(states[path], strict=False)


@torch.no_grad()
def _compare(
    teacher: nn.Module,
    student: nn.Module,
    layers: dict[str, ILMNorm],
    before: dict[str, dict[str, Tensor]],
    inputs: Iterable[Inputs],
) -> tuple[Similarity, Similarity]:
    """The student as it was and as it is, against the teacher."""
    after = _learned(layers)
    like = first_tensor(teacher)
    comparisons = [Comparison("cpu" if like is None else like.device) for _ in range(2)]
    for batch in inputs:
        wanted = _logits(teacher, batch)
        for comparison, states in zip(comparisons, (before, after), strict=True):
            _load(layers, states)
            comparison.update(wanted, _logits(student, batch))
    was, now = (comparison.reduce().result() for comparison in comparisons)
    return was, now


def _logits(model: nn.Module, batch: Inputs) -> Tensor:
    with same_noise():
        return logits_of(batch(model))
