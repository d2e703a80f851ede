"""``ilmconvert verify``."""

from __future__ import annotations

from pathlib import Path

import click
from ilmconvert_cli.opening import original_norms, sample_inputs
from ilmconvert_cli.options import Number, input_size_option, json_option, trust_factory_option

from ilmconvert.jsonable import to_json


@click.command()
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@trust_factory_option
@input_size_option
@click.option("--tolerance", type=Number(), default=1e-5, show_default=True, help="Relative output difference allowed.")
@json_option
@click.pass_context
def verify(
    context: click.Context,
    /,
    folder: Path,
    trust_factory: bool,
    input_size: tuple[int, ...] | None,
    tolerance: float,
    as_json: bool,
) -> None:
    """Compare the converted model in DIR with its original norms put back.

    Outputs, shapes, training at the given batch size and with one sample, modes, and whether every ILM layer runs, can
    move the output, and is not gone around by other code. Ends with 1 if a check fails.
    """
    from ilmconvert_cli.render.verification import print_verification

    import ilmconvert

    conversion = ilmconvert.load_conversion(folder, trust_factory=trust_factory)
    inputs = sample_inputs(conversion.model, input_size)
    result = ilmconvert.verify(original_norms(conversion), conversion.model, inputs, tolerance=tolerance)
    if as_json:
        click.echo(to_json(result.to_dict()))
    else:
        print_verification(result)
    context.exit(0 if result.passed else 1)
