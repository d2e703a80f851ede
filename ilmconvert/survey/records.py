"""What a survey keeps: one record for each model and one for each session, as JSON Lines."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from ilmconvert.errors import CheckpointError, PlanError
from ilmconvert.jsonable import from_data, parse_json, to_json

__all__ = ["Log", "Record", "Session", "Tensors", "append", "read_log"]

Tensors = Literal["meta", "real"]
Status = Literal["ok", "failed", "lost", "left out"]


@dataclass(frozen=True)
class Record:
    """What became of one model.

    Attributes:
        library, name: the model.
        tensors: ``meta`` tensors have shapes and an autograd graph but no values; ``real`` ones have values.
        status: ``ok``; ``failed``: an error or a failed check; ``lost``: its process was ended; ``left out``: larger
            than the survey was to take.
        reason, traceback: why it is not ``ok``.
        model: the class.
        parameters, added_parameters: of the original, and by the conversion.
        norms: norm modules that the independent walk counted.
        unaccounted: those of them that are in no decision, or where the converted model does not hold what was decided.
        converted, skipped: decisions, as ``class -> count`` and ``class: code -> count``.
        calls: norms that are function calls, among them.
        exact: whether the conversion is to start with the original's outputs.
        whole: torch.fx traced the model in one piece.
        untraced: how many modules it could not follow.
        trace_error: why not the whole.
        problems: failed checks, one sentence each.
        trained: ILM layers that ran in training mode and all of whose own parameters got a gradient.
        ran: ILM layers that ran in training mode.
        difference: relative difference of the outputs in evaluation mode (real tensors).
        finite: whether outputs and gradients are (real tensors); None if it was not looked at.
        seconds: processor time of each step: build, convert, check.
        memory: peak of the process so far, in MB.
    """

    library: str
    name: str
    tensors: Tensors
    status: Status
    reason: str | None = None
    traceback: str | None = None
    model: str = ""
    parameters: int = 0
    added_parameters: int = 0
    norms: int = 0
    unaccounted: tuple[str, ...] = ()
    converted: dict[str, int] = field(default_factory=dict)
    skipped: dict[str, int] = field(default_factory=dict)
    calls: int = 0
    exact: bool = False
    whole: bool = False
    untraced: int = 0
    trace_error: str | None = None
    problems: tuple[str, ...] = ()
    trained: int = 0
    ran: int = 0
    difference: float | None = None
    finite: bool | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    memory: int = 0

    def to_dict(self) -> dict[str, Any]:
        """As plain data, without what is empty."""
        return {key: value for key, value in asdict(self).items() if value not in (None, (), {}, "")}

    @property
    def key(self) -> tuple[str, str]:
        """Library and name."""
        return self.library, self.name


@dataclass(frozen=True)
class Session:
    """One run of the survey: how long it took, its peak memory, what it ran with, and the command that asks for it."""

    libraries: tuple[str, ...]
    tensors: Tensors
    jobs: int
    models: int
    wall_seconds: float
    peak_memory: int
    versions: dict[str, str] = field(default_factory=dict)
    command: str = ""

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


@dataclass(frozen=True)
class Log:
    """A file of records: the last one of each model, and the sessions."""

    records: tuple[Record, ...] = ()
    sessions: tuple[Session, ...] = ()


def read_log(file: str | Path) -> Log:
    """Read a file of records; of several for one model the last counts, and a last line cut short is passed over.

    Raises:
        CheckpointError: the file cannot be read, or another line than the last is no record.
    """
    try:
        lines = Path(file).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"the survey in {str(file)!r} cannot be read: {error}") from error
    records: dict[tuple[str, str], Record] = {}
    sessions = []
    for number, line in enumerate(lines, start=1):
        entry = _parse(line, f"{file}:{number}", last=number == len(lines)) if line else None
        if isinstance(entry, Record):
            records[entry.key] = entry
        elif entry is not None:
            sessions.append(entry)
    return Log(tuple(records.values()), tuple(sessions))


def _parse(line: str, where: str, *, last: bool) -> Record | Session | None:
    try:
        data = parse_json(line)
    except ValueError as error:
        if last:  # a complete line ends in a line feed: this one was being written when the survey was ended
            return None
        raise CheckpointError(f"expected JSON at {where}, but: {error}") from error
    kind: Any = Session if isinstance(data, dict) and "jobs" in data else Record
    try:
        entry: Record | Session = from_data(kind, data, where)
    except PlanError as error:
        raise CheckpointError(str(error)) from error
    return entry


def append(file: Path, entries: Iterable[Record | Session]) -> None:
    """Add lines and force them to disk; a line cut short by an earlier interruption is cut off first."""
    with file.open("a+b") as out:
        _cut_torn_line(out)
        for entry in entries:
            out.write(to_json(entry.to_dict(), indent=None).encode() + b"\n")
        out.flush()
        os.fsync(out.fileno())


def _cut_torn_line(out: Any) -> None:
    size = out.seek(0, os.SEEK_END)
    start = max(0, size - (1 << 20))
    out.seek(start)
    tail = out.read()
    if tail and not tail.endswith(b"\n"):
        out.truncate(start + tail.rfind(b"\n") + 1)
    out.seek(0, os.SEEK_END)
