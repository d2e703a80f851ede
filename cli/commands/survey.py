"""``ilmconvert survey``."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import click
from ilmconvert_cli.options import Number, json_option

LIBRARIES = ("timm", "torchvision", "transformers", "segmentation_models_pytorch")  # without importing torch


@click.command()
@click.argument("patterns", nargs=-1, metavar="[PATTERN]...")
@click.option(
    "--library",
    "libraries",
    type=click.Choice(LIBRARIES),
    multiple=True,
    help="Whose models; repeatable.  [default: timm]",
)
@click.option(
    "--output",
    "-o",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Keep records here (JSON Lines).",
)
@click.option(
    "--markdown", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE", help="Write the coverage page."
)
@click.option("--resume", is_flag=True, help="Go on with FILE: what passed is not run again, what failed is.")
@click.option("--force", is_flag=True, help="Begin an existing FILE anew.")
@click.option(
    "--real", is_flag=True, help="Real tensors: outputs are compared. Otherwise shapes and graphs alone (meta)."
)
@click.option("--batch-size", type=int, default=2, show_default=True, help="Samples in the inputs.")
@click.option("--max-parameters", type=Number(), metavar="N", help="Leave out larger models, such as 60e6.")
@click.option("--exact-only", is_flag=True, help="Leave out models with Batch Norm or other inexact norms.")
@click.option("--sample", type=int, metavar="N", help="Take N of the models at random.")
@click.option("--seed", type=int, default=0, show_default=True, help="For --sample.")
@click.option("--jobs", "-j", type=int, default=1, show_default=True, help="Processes.")
@click.option("--time-limit", type=Number(), default=600, show_default=True, metavar="SECONDS", help="For one model.")
@click.option(
    "--memory-limit", type=Number(), default=8, show_default=True, metavar="GB", help="For one process (Linux)."
)
@json_option
@click.pass_context
def survey(
    context: click.Context,
    /,
    patterns: tuple[str, ...],
    libraries: tuple[str, ...],
    output: Path | None,
    markdown: Path | None,
    resume: bool,
    force: bool,
    max_parameters: float | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Convert all models of a library that match PATTERN (all without one), and check each conversion.

    Each model runs in a worker process with a time and a memory limit; losing one loses that model alone. Ends with 1
    if a model did not pass.
    """
    from ilmconvert_cli.render.survey import print_survey, survey_bar
    from ilmconvert_cli.writing import check_file, write_file

    from ilmconvert.errors import UsageError
    from ilmconvert.jsonable import to_json
    from ilmconvert.survey import SurveyOptions, coverage_page, is_page, run_survey

    replace = markdown is not None and (force or is_page(markdown))
    if markdown is not None:
        check_file(markdown, force=replace)  # before any work is done
    if resume and output is None:
        raise UsageError("expected --output FILE to resume from")
    wanted = SurveyOptions(
        libraries=libraries or ("timm",),
        patterns=patterns,
        max_parameters=None if max_parameters is None else int(max_parameters),
        **options,
    )
    with tempfile.TemporaryDirectory() as folder, survey_bar(quiet=as_json) as bar:
        file = output or Path(folder) / "survey.jsonl"
        log = run_survey(wanted, file, resume=resume, force=force, progress=bar.progress, on_record=bar.tell)
    if markdown is not None:
        write_file(markdown, coverage_page(log), force=replace)
    if as_json:
        for record in log.records:
            click.echo(to_json(record.to_dict(), indent=None))
    else:
        print_survey(log)
    context.exit(1 if any(r.status in ("failed", "lost") for r in log.records) else 0)
