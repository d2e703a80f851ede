"""``ilmconvert calibrate``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click
from ilmconvert_cli.opening import open_teacher
from ilmconvert_cli.options import (
    calibration_options,
    held_out_once,
    input_size_option,
    json_option,
    teacher_options,
    trust_factory_option,
)
from ilmconvert_cli.writing import check_apart

from ilmconvert.errors import OutputExistsError
from ilmconvert.jsonable import to_json


@click.command()
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--images", required=True, type=click.Path(path_type=Path), metavar="FOLDER", help="Images to fit to.")
@click.option(
    "--output", "-o", type=click.Path(path_type=Path), metavar="OUT", help="Folder to save in; DIR itself with --force."
)
@calibration_options
@teacher_options
@click.option("--force", is_flag=True, help="Replace a conversion saved in OUT (or DIR) before.")
@trust_factory_option
@input_size_option
@json_option
@click.pass_context
def calibrate(
    context: click.Context,
    /,
    folder: Path,
    images: Path,
    output: Path | None,
    teacher: str | None,
    teacher_checkpoint: Path | None,
    force: bool,
    trust_factory: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Fit the layers in DIR that replaced BatchNorms to what those gave out, from unlabelled images.

    Closed form: no gradients, no labels. Runs under torchrun too; each process takes its share of the images.
    """
    from ilmconvert_cli.calibrating import calibrate_conversion
    from ilmconvert_cli.render.calibration import print_calibration
    from ilmconvert_cli.render.progress import progress_bar
    from ilmconvert_cli.render.report import print_saved

    import ilmconvert
    from ilmconvert.checkpoint import save
    from ilmconvert.checkpoint.folder import check_target

    held_out_once(context)
    if output is None and not force:
        raise OutputExistsError(f"expected --output OUT, or --force to replace {str(folder)!r} itself")
    target = output or folder
    check_target(target, force=force)  # before any work is done
    check_apart(target, images, options["held_out_images"])
    conversion = ilmconvert.load_conversion(folder, trust_factory=trust_factory)
    original = open_teacher(conversion, teacher, teacher_checkpoint, trust_factory)
    main = os.environ.get("RANK", "0") == "0"
    with progress_bar(quiet=as_json or not main) as progress:
        calibrated = calibrate_conversion(conversion, original, images, progress=progress, **options)
    if not main:
        return
    save(calibrated.conversion, target, force=force, records=calibrated.records())
    if as_json:
        click.echo(to_json({"output": str(target), **calibrated.to_dict()}))
        return
    print_calibration(calibrated.report, calibrated.broken)
    print_saved(target, calibrated.conversion.model, options["input_size"])
