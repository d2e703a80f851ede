"""Keep the garbage collector out of work that makes many objects and little garbage."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["collector_paused"]


@contextmanager
def collector_paused() -> Iterator[None]:
    """Within it, Python's cyclic garbage collector does not run by itself; afterwards it does if it did before.

    Copying a model makes tens of thousands of objects, which sets the collector off to walk all of torch's: that may
    take as long as the copy.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
