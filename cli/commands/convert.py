"""``ilmconvert convert``."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from ilmconvert_cli.calibrating import calibrate_conversion
from ilmconvert_cli.opening import open_model, sample_inputs
from ilmconvert_cli.options import conversion_options, given, json_option, model_options
from ilmconvert_cli.writing import check_apart

from ilmconvert.errors import PlanError, UsageError
from ilmconvert.jsonable import to_json

if TYPE_CHECKING:
    from ilmconvert_cli.calibrating import Calibrated

    from ilmconvert import Conversion, Plan, Report


@click.command()
@model_options
@click.option("--output", "-o", type=click.Path(path_type=Path), metavar="DIR", help="Folder to save the result in.")
@conversion_options
@click.option("--plan", "plan_file", type=click.Path(path_type=Path), metavar="FILE", help="Carry out this plan.")
@click.option(
    "--calibrate",
    "images",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    help="Fit what replaces BatchNorm to these images at once, as ilmconvert calibrate does.",
)
@click.option("--dry-run", is_flag=True, help="Print what would be done (with --json, the plan); write nothing.")
@click.option("--force", is_flag=True, help="Replace a conversion saved in DIR before.")
@json_option
@click.pass_context
def convert(
    context: click.Context,
    /,
    model: str,
    pretrained: bool,
    checkpoint: Path | None,
    model_args: tuple[tuple[str, Any], ...],
    trust_factory: bool,
    input_size: tuple[int, ...] | None,
    output: Path | None,
    plan_file: Path | None,
    images: Path | None,
    dry_run: bool,
    force: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Convert MODEL's norms to ILM-Norm and save the result in DIR.

    Group, Layer, Instance and RMS norms start with the same outputs, to rounding. BatchNorm layers start close to their
    evaluation output, without data. A saved folder as MODEL is converted anew from its original norms.
    """
    from ilmconvert_cli.render.progress import progress_bar

    if output is None and not dry_run:
        raise click.UsageError("Missing option '--output' / '-o' (or ask for a --dry-run).")
    import ilmconvert
    from ilmconvert.checkpoint import save
    from ilmconvert.checkpoint.folder import check_target

    if output is not None and not dry_run:
        check_target(output, force=force)  # before any work is done
        check_apart(output, images)
    plan = None if plan_file is None else _read_plan(plan_file, context)
    opened = open_model(
        model,
        pretrained=pretrained,
        checkpoint=checkpoint,
        model_args=model_args,
        trust_factory=trust_factory,
    )
    if plan is None:
        inputs = sample_inputs(opened.model, input_size)
        plan = ilmconvert.inspect(opened.model, example_inputs=inputs, **options).plan
    calibrated = None
    with progress_bar(quiet=as_json) as progress:
        conversion = ilmconvert.apply_plan(opened.model, plan, progress=progress)
        if images is not None and not dry_run:
            calibrated = calibrate_conversion(
                conversion, opened.model, images, input_size=input_size, progress=progress
            )
            conversion = calibrated.conversion
    if dry_run or output is None:
        _print_dry_run(conversion.report, as_json)
        return
    records = calibrated.records() if calibrated else None
    save(conversion, output, factory=opened.factory, model_args=opened.model_args, force=force, records=records)
    _print_result(conversion, calibrated, output, input_size, as_json)


def _read_plan(file: Path, context: click.Context) -> Plan:
    """The plan in a file; it already holds the answers that the conversion options would give."""
    import ilmconvert

    if more := given(context, *(field.name for field in fields(ilmconvert.ConvertOptions))):
        raise UsageError(f"expected --plan alone, got {', '.join(more)} too; the plan already decides that: edit it")
    try:
        return ilmconvert.Plan.from_json(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, PlanError) as error:
        raise UsageError(f"the plan {str(file)!r} cannot be read: {error}") from error


def _print_dry_run(report: Report, as_json: bool) -> None:
    from ilmconvert_cli.render.report import print_sites, print_summary

    if as_json:
        click.echo(report.plan.to_json(), nl=False)
        return
    print_sites(report)
    print_summary(report, would=True)


def _print_result(
    conversion: Conversion,
    calibrated: Calibrated | None,
    output: Path,
    input_size: tuple[int, ...] | None,
    as_json: bool,
) -> None:
    from ilmconvert_cli.render.calibration import print_calibration
    from ilmconvert_cli.render.report import print_saved, print_summary

    if as_json:
        more = {"calibration": calibrated.to_dict()} if calibrated else {}
        click.echo(to_json({"output": str(output), **conversion.report.to_dict(), **more}))
        return
    print_summary(conversion.report)
    if calibrated:
        print_calibration(calibrated.report, calibrated.broken)
    print_saved(output, conversion.model, input_size)
