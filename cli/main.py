"""The ``ilmconvert`` command and its one error boundary."""

from __future__ import annotations

import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import TextIOWrapper
from pathlib import Path

import click
from ilmconvert_cli.commands.calibrate import calibrate
from ilmconvert_cli.commands.convert import convert
from ilmconvert_cli.commands.diff import diff
from ilmconvert_cli.commands.inspect import inspect
from ilmconvert_cli.commands.recover import recover
from ilmconvert_cli.commands.survey import survey
from ilmconvert_cli.commands.verify import verify

from ilmconvert import __version__

__all__ = ["cli", "main"]


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="ilmconvert")
def cli() -> None:
    """Swap the normalization layers of a PyTorch model for ILM-Norm.

    MODEL is a timm name (resnet50, vit_tiny_patch16_224, hf-hub:...), a folder saved by ilmconvert, or
    package.module:factory.
    """


for command in (inspect, convert, calibrate, recover, verify, diff, survey):
    cli.add_command(command)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 2 for a wrong request, 143 for SIGTERM, 1 for other failures."""
    warnings.showwarning = _warn  # type: ignore[assignment]
    if sys.stdout is None:  # closed by the caller
        sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # a name that it cannot spell is no reason to fail
            stream.reconfigure(errors="backslashreplace")
    try:
        with _terminable():
            result = cli.main(args=None if argv is None else list(argv), prog_name="ilmconvert", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except click.exceptions.Abort as error:
        click.echo("Aborted.", err=True)
        return 128 + signal.SIGTERM if isinstance(error.__cause__, _Terminated) else 1
    except Exception as error:  # the boundary: one clear line instead of a traceback
        return _failed(error)


class _Terminated(KeyboardInterrupt):
    """SIGTERM: ``timeout``, ``docker stop`` and SLURM end a process so. It is to tidy up as it does after Ctrl-C."""


@contextmanager
def _terminable() -> Iterator[None]:
    """Have SIGTERM raise, unless the caller made something else of it."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _terminate(*_: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # SLURM tells torchrun too, which tells its processes again
    raise _Terminated


def _warn(message: Warning | str, *_: object) -> None:
    """A warning in one line, without the place in the code."""
    click.echo(f"Warning: {message}", err=True)


def _failed(error: Exception) -> int:
    from ilmconvert.errors import IlmconvertError
    from ilmconvert.wording import brief

    if os.environ.get("ILMCONVERT_DEBUG"):
        raise error
    if isinstance(error, IlmconvertError):
        click.echo(f"Error: {error}", err=True)
        return error.exit_code
    code: int = getattr(error, "exit_code", 1)
    if isinstance(error, OSError) or _is_memory(error):
        click.echo(f"Error: {error if isinstance(error, OSError) else brief(error)}", err=True)
        return code
    click.echo(f"Error: unexpected {brief(error, 1000)}\nThis is a defect; ILMCONVERT_DEBUG=1 shows where.", err=True)
    return code


def _is_memory(error: Exception) -> bool:
    """Whether memory was too small; on CPUs torch says so in words alone."""
    return isinstance(error, MemoryError) or "can't allocate memory" in str(error) or "out of memory" in str(error)


if __name__ == "__main__":
    sys.exit(main())
