"""Every error that ilmconvert raises on purpose.

::

    IlmconvertError            exit code 1   something could not be done
    ├── UsageError             exit code 2   the request itself is wrong (also a ValueError)
    │   ├── UnknownModelError                the MODEL argument names nothing
    │   └── OutputExistsError                the target is there and --force was not given
    ├── ModelError                           the model cannot be converted as it stands
    ├── PlanError                            a plan does not fit the model it is applied to
    └── CheckpointError                      a file or a saved folder cannot be read or does not fit
        └── NotFoundError      exit code 2   there is none at that path (also a UsageError)

Each message states what was expected, what was found, where, and what to do next.
"""

from __future__ import annotations

__all__ = [
    "CheckpointError",
    "IlmconvertError",
    "ModelError",
    "NotFoundError",
    "OutputExistsError",
    "PlanError",
    "UnknownModelError",
    "UsageError",
]


class IlmconvertError(Exception):
    """Base of all deliberate errors; ``exit_code`` is what the command line ends with."""

    exit_code = 1


class UsageError(IlmconvertError, ValueError):
    """The request is wrong: an option, an argument or a combination of them."""

    exit_code = 2


class UnknownModelError(UsageError):
    """A MODEL argument that is neither a timm name, a saved folder nor ``package.module:factory``."""


class OutputExistsError(UsageError):
    """The output is there already; nothing is overwritten without being asked."""


class ModelError(IlmconvertError):
    """The model cannot be converted as it stands."""


class PlanError(IlmconvertError):
    """A plan does not fit the model it is applied to."""


class CheckpointError(IlmconvertError):
    """A checkpoint or a saved conversion cannot be read, or does not fit the model."""


class NotFoundError(CheckpointError, UsageError):
    """A path that was given holds no checkpoint, or no saved conversion."""
