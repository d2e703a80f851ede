"""Tasks over worker processes that may be killed: one process for each slot, which a lost task takes down alone.

``concurrent.futures`` loses all pending work when one of its processes dies, and cannot stop a task; so each slot has
an executor of its own with a single process and a single task at a time, made anew when it is lost or has grown old.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

__all__ = ["Lost", "run_tasks"]

Task = TypeVar("Task")
_OLD = 150  # tasks after which a process is replaced: tracing leaves caches behind


@dataclass(frozen=True)
class Lost:
    """Why a task has no result."""

    reason: str


@dataclass
class _Slot(Generic[Task]):
    memory_limit: float | None
    executor: ProcessPoolExecutor | None = None
    pid: int = 0
    done: int = 0
    task: Task | None = None
    future: Future[Any] | None = None
    deadline: float = field(default=float("inf"))

    def start(self, work: Callable[[Task], Any], task: Task, time_limit: float | None) -> None:
        if self.executor is None:
            context = multiprocessing.get_context("spawn")
            self.executor = ProcessPoolExecutor(1, context, initializer=_bound, initargs=(self.memory_limit,))
            self.pid, self.done = self.executor.submit(_ready, work).result(), 0
        self.task, self.future = task, self.executor.submit(work, task)
        self.deadline = time.monotonic() + time_limit if time_limit else float("inf")

    def finish(self) -> Any:
        """The result of the task, which is done, or why there is none; the slot is free then."""
        assert self.future is not None
        try:
            result = self.future.result()
        except BrokenProcessPool:
            late = time.monotonic() >= self.deadline
            result = Lost("it took longer than the time limit" if late else "its process died (out of memory?)")
            self.close()
        self.task, self.future, self.done = None, None, self.done + 1
        if self.done >= _OLD:
            self.close()
        return result

    def kill(self) -> None:
        if self.executor is not None:
            os.kill(self.pid, signal.SIGKILL if hasattr(signal, "SIGKILL") else signal.SIGTERM)

    def close(self) -> None:
        if self.executor is not None:
            self.executor.shutdown(cancel_futures=True)
        self.executor = None


def run_tasks(
    work: Callable[[Task], Any],
    tasks: Sequence[Task],
    *,
    jobs: int = 1,
    time_limit: float | None = None,
    memory_limit: float | None = None,
    on_change: Callable[[list[Task]], None] | None = None,
) -> Iterator[tuple[Task, Any]]:
    """Yield (task, result) as they come; a result is a :class:`Lost` where the process died or was stopped.

    Args:
        work: a function that can be pickled; it must not raise.
        tasks: its arguments.
        jobs: processes.
        time_limit: seconds for one task.
        memory_limit: of one process, in GB, where the system can bound it (``RLIMIT_DATA``); a task that wants more
            gets a ``MemoryError``.
        on_change: called with the running tasks whenever one starts.
    """
    waiting = list(reversed(tasks))
    slots: list[_Slot[Task]] = [_Slot(memory_limit) for _ in range(min(jobs, len(tasks)))]
    try:
        while waiting or any(slot.future for slot in slots):
            for slot in slots:
                if slot.future is None and waiting:
                    slot.start(work, waiting.pop(), time_limit)
                    if on_change is not None:
                        on_change([s.task for s in slots if s.task is not None])
            _wait(slots)
            for slot in slots:
                if slot.future is not None and slot.future.done():
                    task = slot.task
                    assert task is not None
                    yield task, slot.finish()
    finally:
        for slot in slots:
            if slot.future is not None:
                slot.kill()
            slot.close()


def _wait(slots: Sequence[_Slot[Any]]) -> None:
    """Until a task is done; one past its time is stopped."""
    running = {slot.future: slot for slot in slots if slot.future is not None}
    soonest = min(slot.deadline for slot in running.values())
    timeout = None if soonest == float("inf") else max(0.0, soonest - time.monotonic())
    done, _ = wait(running, timeout, return_when=FIRST_COMPLETED)
    if not done:
        for slot in running.values():
            if time.monotonic() >= slot.deadline:
                slot.kill()
        wait(running, 10, return_when=FIRST_COMPLETED)


def _ready(work: object) -> int:
    """The process's id, once it has imported what ``work`` needs: time limits are for the tasks alone."""
    del work
    return os.getpid()


def _bound(memory_limit: float | None) -> None:
    """In each new process: bound its memory, leave Ctrl-C to the parent, and end when the parent does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_follow_parent, daemon=True).start()
    if memory_limit is not None and sys.platform == "linux":
        import resource

        size = int(memory_limit * 1e9)
        resource.setrlimit(resource.RLIMIT_DATA, (size, size))


def _follow_parent() -> None:
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
        os._exit(1)
