"""``ilmconvert inspect``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from ilmconvert_cli.opening import open_model, sample_inputs
from ilmconvert_cli.options import conversion_options, json_option, model_options


@click.command()
@model_options
@conversion_options
@json_option
def inspect(
    model: str,
    pretrained: bool,
    checkpoint: Path | None,
    model_args: tuple[tuple[str, Any], ...],
    trust_factory: bool,
    input_size: tuple[int, ...] | None,
    as_json: bool,
    **options: Any,
) -> None:
    """List every norm of MODEL and what convert would do with it.

    With --json it prints the plan, which convert --plan carries out, edited or not. A saved folder as MODEL stands for
    its original norms.
    """
    from ilmconvert_cli.render.report import print_sites, print_summary

    import ilmconvert

    opened = open_model(
        model,
        pretrained=pretrained,
        checkpoint=checkpoint,
        model_args=model_args,
        trust_factory=trust_factory,
    )
    report = ilmconvert.inspect(opened.model, example_inputs=sample_inputs(opened.model, input_size), **options)
    if as_json:
        click.echo(report.plan.to_json(), nl=False)
        return
    print_sites(report)
    print_summary(report, would=True)
