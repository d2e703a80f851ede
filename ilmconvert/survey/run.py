"""Examine many models over processes, and append a record of each as it comes."""

from __future__ import annotations

import platform
import random
import shlex
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from ilmconvert.errors import OutputExistsError, UsageError
from ilmconvert.survey.examine import Task, examine
from ilmconvert.survey.libraries import LIBRARIES, matching
from ilmconvert.survey.pool import Lost, run_tasks
from ilmconvert.survey.records import Log, Record, Session, Tensors, append, read_log

__all__ = ["SurveyOptions", "run_survey"]


@dataclass(frozen=True)
class SurveyOptions:
    """What to survey and how.

    Attributes:
        libraries: among ``timm``, ``torchvision``, ``transformers`` and ``segmentation_models_pytorch``.
        patterns: shell patterns of model names; none means all.
        real: use real tensors: outputs are compared and must be finite.
        batch_size: samples in the inputs.
        max_parameters: leave out larger models.
        exact_only: leave out models with norms that cannot convert exactly (Batch Norm).
        sample, seed: take so many models at random.
        jobs: processes.
        time_limit: seconds for one model.
        memory_limit: GB for one process.

    Raises:
        UsageError: a value out of range.
    """

    libraries: tuple[str, ...] = ("timm",)
    patterns: tuple[str, ...] = ()
    real: bool = False
    batch_size: int = 2
    max_parameters: int | None = None
    exact_only: bool = False
    sample: int | None = None
    seed: int = 0
    jobs: int = 1
    time_limit: float | None = 600.0
    memory_limit: float | None = 8.0

    def __post_init__(self) -> None:
        for name in ("batch_size", "max_parameters", "sample", "jobs", "time_limit", "memory_limit"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UsageError(f"expected {name} to be positive, got {value!r}")

    @property
    def tensors(self) -> Tensors:
        """The kind of tensors asked for."""
        return "real" if self.real else "meta"

    @property
    def command(self) -> str:
        """What asks for the same on the command line.

        Example:
            >>> SurveyOptions(patterns=("vit_*",), real=True, max_parameters=60_000_000).command
            "ilmconvert survey 'vit_*' --real --max-parameters 60000000"
        """
        defaults, words = SurveyOptions(), [*map(shlex.quote, self.patterns)]
        if self.libraries != defaults.libraries:
            words += [f"--library {name}" for name in self.libraries]
        for each in fields(self):
            value = getattr(self, each.name)
            if each.name not in ("libraries", "patterns") and value != getattr(defaults, each.name):
                words.append(f"--{each.name.replace('_', '-')}" + ("" if value is True else f" {value}"))
        return " ".join(["ilmconvert survey", *words])

    def models(self) -> list[tuple[str, str]]:
        """(library, name) of every model meant.

        Raises:
            UsageError: a pattern that matches nothing.
        """
        found = [(lib, name) for lib in dict.fromkeys(self.libraries) for name in matching(lib, self.patterns)]
        for pattern in self.patterns:
            if not any(matching(lib, (pattern,)) for lib in self.libraries):
                raise UsageError(f"expected the pattern {pattern!r} to match a model of {', '.join(self.libraries)}")
        if self.sample is None or self.sample >= len(found):
            return found
        return sorted(random.Random(self.seed).sample(found, self.sample))


def run_survey(
    options: SurveyOptions,
    file: str | Path,
    *,
    resume: bool = False,
    force: bool = False,
    progress: Callable[[tuple[str, ...], int, int], None] | None = None,
    on_record: Callable[[Record], None] | None = None,
) -> Log:
    """Survey models and append what comes out to ``file``.

    Args:
        options: what and how.
        file: JSON Lines: a record for each model as it is finished, at the end one for the session.
        resume: go on with an existing file: models whose last record is ``ok`` or ``left out`` are not run again;
            those that failed or were lost are.
        force: begin an existing file anew.
        progress: called with (names running, models done, models in all).
        on_record: called with each new record.

    Returns:
        Everything in the file.

    Raises:
        UsageError: a pattern that matches nothing, an unknown library, contradictory arguments.
        OutputExistsError: the file exists and neither ``resume`` nor ``force`` is given.
        CheckpointError: the file to resume is no survey.
    """
    models, target = options.models(), Path(file)
    log = _prepare(target, resume=resume, force=force)
    settled = {r.key for r in log.records if r.status in ("ok", "left out") and r.tensors == options.tensors}
    settled |= {r.key for r in log.records if r.status == "ok" and r.tensors == "real"}
    todo = [Task(lib, name, options.tensors, options) for lib, name in models if (lib, name) not in settled]
    done, peak, start = len(models) - len(todo), 0, time.monotonic()

    def tell(running: list[Task]) -> None:
        if progress is not None:
            progress(tuple(task.name for task in running), done, len(models))

    results = run_tasks(
        examine,
        todo,
        jobs=options.jobs,
        time_limit=options.time_limit,
        memory_limit=options.memory_limit,
        on_change=tell,
    )
    for task, result in results:
        record = _lost(task, result) if isinstance(result, Lost) else result
        append(target, [record])
        done, peak = done + 1, max(peak, record.memory)
        if on_record is not None:
            on_record(record)
    if todo:
        append(target, [_session(options, len(todo), time.monotonic() - start, peak)])
    return read_log(target)


def _prepare(target: Path, *, resume: bool, force: bool) -> Log:
    if resume and force:
        raise UsageError("expected resume or force, got both; resume goes on with the file, force begins it anew")
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        target.touch()
        return Log()
    if resume:
        return read_log(target)
    if not force:
        raise OutputExistsError(f"expected a new file, but {str(target)!r} exists; resume it (--resume) or --force")
    target.write_bytes(b"")
    return Log()


def _lost(task: Task, lost: Lost) -> Record:
    return Record(task.library, task.name, task.tensors, "lost", reason=lost.reason)


def _session(options: SurveyOptions, models: int, seconds: float, peak: int) -> Session:
    versions = {"python": platform.python_version()}
    for package in ("torch", *LIBRARIES):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    wall = round(seconds, 1)
    return Session(options.libraries, options.tensors, options.jobs, models, wall, peak, versions, options.command)
