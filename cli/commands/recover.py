"""``ilmconvert recover``."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from ilmconvert_cli.opening import open_teacher
from ilmconvert_cli.options import (
    given,
    held_out_once,
    input_size_option,
    json_option,
    recovery_options,
    teacher_options,
    trust_factory_option,
)
from ilmconvert_cli.writing import check_apart

from ilmconvert.errors import OutputExistsError, UsageError
from ilmconvert.jsonable import to_json

if TYPE_CHECKING:
    from torch import nn

    from ilmconvert import Conversion, Recovery


@click.command()
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--images", required=True, type=click.Path(path_type=Path), metavar="FOLDER", help="Images to train on.")
@click.option(
    "--output", "-o", required=True, type=click.Path(path_type=Path), metavar="OUT", help="Folder to save in."
)
@click.option(
    "--held-out-images",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    help="Measure on these images, instead of a share of --images.",
)
@click.option("--labels", is_flag=True, help="Train on labels: FOLDER has a folder for each class.")
@click.option("--reset-classifier", is_flag=True, help="With --labels: a new head for these classes (timm models).")
@teacher_options
@recovery_options
@click.option("--resume", is_flag=True, help="Go on with a run that was broken off.")
@click.option("--force", is_flag=True, help="Replace a conversion saved in OUT before, and a run broken off.")
@trust_factory_option
@input_size_option
@json_option
@click.pass_context
def recover(
    context: click.Context,
    /,
    folder: Path,
    images: Path,
    output: Path,
    held_out_images: Path | None,
    labels: bool,
    reset_classifier: bool,
    teacher: str | None,
    teacher_checkpoint: Path | None,
    resume: bool,
    force: bool,
    trust_factory: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Train the converted model in DIR until it answers as its original does, and save the best of it in OUT.

    Needs no labels: the original teaches, on random crops of the images. The result is never worse than the start on
    the images held out. A run that is broken off goes on with --resume. Runs under torchrun and accelerate launch too.
    """
    from ilmconvert_cli.render.progress import progress_bar
    from ilmconvert_cli.render.recovery import print_evaluation

    import ilmconvert
    from ilmconvert.checkpoint.folder import check_target
    from ilmconvert.training.records import need_matplotlib

    held_out_once(context)
    if labels and (unused := given(context, "teacher", "teacher_checkpoint")):
        raise UsageError(f"expected --labels or {unused[0]}, got both: with labels there is no teacher")
    check_target(output, force=force)  # before any work is done
    check_apart(output, images, held_out_images)
    need_matplotlib()
    run = _run_folder(output, resume=resume, force=force)
    wanted = ilmconvert.RecoverOptions(**options)
    conversion = ilmconvert.load_conversion(folder, trust_factory=trust_factory)
    original = None if labels else open_teacher(conversion, teacher, teacher_checkpoint, trust_factory)
    if reset_classifier:
        _reset_classifier(conversion.model, images, labels)
    main = os.environ.get("RANK", "0") == "0"
    with _alone(run, main=main), progress_bar(quiet=as_json or not main) as progress:
        recovery = ilmconvert.recover(
            original,
            conversion.model,
            images,
            wanted,
            labels=labels,
            held_out_images=held_out_images,
            run_folder=run,
            resume=resume,
            progress=progress,
            on_evaluation=None if as_json else print_evaluation,
        )
    if main:
        _save(conversion, recovery, output, force)
        shutil.rmtree(run)
        _print_result(recovery, output, wanted.input_size, as_json)


def _run_folder(output: Path, *, resume: bool, force: bool) -> Path:
    """Where the state of the run is kept until it is done, beside the output."""
    from ilmconvert.training.state import is_run_file

    run = output.resolve().with_name(f"{output.resolve().name}.run")
    foreign = sorted(file.name for file in run.iterdir() if not is_run_file(file.name)) if run.is_dir() else []
    if foreign or run.is_file():
        raise OutputExistsError(
            f"expected {str(run)!r} for the state of the run, but there is something else: "
            f"{', '.join(foreign[:5]) or 'a file'}. Choose another folder to save in"
        )
    if resume and not _begun(run):
        raise UsageError(f"expected a run to go on with in {str(run)!r}, found none; leave out --resume to begin one")
    if _begun(run) and not (resume or force):
        raise OutputExistsError(
            f"expected no run that was broken off, but {str(run)!r} exists; go on with --resume, or give --force to "
            "begin anew"
        )
    return run


def _begun(run: Path) -> bool:
    """Whether there is something to go on with: the disk may have refused the first checkpoint."""
    from ilmconvert.training.state import CHECKPOINT

    return (run / CHECKPOINT).is_file()


@contextmanager
def _alone(run: Path, *, main: bool) -> Iterator[None]:
    """Refuse a run that another process works on, and say how an interrupted one goes on.

    Where the operating system has no such locks (Windows), two processes on one run are not noticed.
    """
    known = main and importlib.util.find_spec("fcntl") is not None
    with _locked(run) if known else nullcontext():
        try:
            yield
        except KeyboardInterrupt:
            if main and _begun(run):
                click.echo(f"The run is kept in {run}; it goes on with --resume.", err=True)
            raise


@contextmanager
def _locked(run: Path) -> Iterator[None]:
    """Hold a lock that goes with the process, however that ends."""
    import fcntl

    name = hashlib.sha256(str(run).encode()).hexdigest()[:16]
    file = Path(tempfile.gettempdir()) / f"ilmconvert-{name}.lock"
    with file.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OutputExistsError(f"expected {str(run)!r} for itself, but another process works on it") from error
        try:
            yield
        finally:
            file.unlink(missing_ok=True)


def _reset_classifier(model: nn.Module, images: Path, labels: bool) -> None:
    from ilmconvert.images import image_files
    from ilmconvert.training.data import class_names

    reset = getattr(model, "reset_classifier", None)
    if not labels or not callable(reset):
        raise UsageError("expected --reset-classifier with --labels, and a timm model, which has reset_classifier()")
    reset(len(class_names(image_files(images))))


def _save(conversion: Conversion, recovery: Recovery, output: Path, force: bool) -> None:
    from ilmconvert.checkpoint import save
    from ilmconvert.training.records import records

    save(replace(conversion, model=recovery.model), output, force=force, records=records(recovery.report))


def _print_result(recovery: Recovery, output: Path, input_size: tuple[int, ...] | None, as_json: bool) -> None:
    from ilmconvert_cli.render.recovery import print_recovery
    from ilmconvert_cli.render.report import print_saved

    if as_json:
        click.echo(to_json({"output": str(output), **recovery.report.to_dict()}))
        return
    print_recovery(recovery.report)
    print_saved(output, recovery.model, input_size)
