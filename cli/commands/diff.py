"""``ilmconvert diff``."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from ilmconvert_cli.opening import open_pair
from ilmconvert_cli.options import input_size_option, model_arg_option, pretrained_option, trust_factory_option

from ilmconvert.errors import UsageError

if TYPE_CHECKING:
    from ilmconvert_cli.opening import Pair

    from ilmconvert import GraphDiff

FORMATS = ("text", "unified", "markdown", "json", "html", "svg", "png")
_WIDTH = 80  # where there is no terminal
_NARROWEST = 40


class _Diff(click.Command):
    def invoke(self, context: click.Context) -> Any:
        """Run; with --exit-code, where 1 says that the models differ, every failure is a 2."""
        try:
            return super().invoke(context)
        except click.exceptions.Exit:
            raise
        except Exception as error:
            if context.params["exit_code"]:
                error.exit_code = 2  # type: ignore[attr-defined]  # what main() ends with
            raise


@click.command(cls=_Diff)
@click.argument("a")
@click.argument("b", required=False)
@click.option(
    "--format", "form", type=click.Choice(FORMATS), help="What to print.  [default: by --output's ending, or text]"
)
@click.option("--output", "-o", type=click.Path(path_type=Path), metavar="FILE", help="Write to a file instead.")
@click.option("--force", is_flag=True, help="Replace FILE if it exists.")
@click.option("--all", "unfold", is_flag=True, help="Show what is equal, too (text).")
@click.option("--summary", is_flag=True, help="At most ten lines (text).")
@click.option("--block", metavar="PATH", help="Draw this module only (svg, png).")
@click.option(
    "--numerics",
    metavar="random|FOLDER",
    help="Run both on random inputs or on a folder of images; compare activations.",
)
@click.option(
    "--limit", type=click.IntRange(min=1), metavar="N", help="Samples for --numerics.  [default: 4 random, 32 images]"
)
@click.option("--exit-code", is_flag=True, help="End with 1 if the structure differs, 2 on any failure.")
@pretrained_option
@model_arg_option
@trust_factory_option
@input_size_option
@click.pass_context
def diff(
    context: click.Context,
    /,
    a: str,
    b: str | None,
    form: str | None,
    output: Path | None,
    force: bool,
    unfold: bool,
    summary: bool,
    block: str | None,
    numerics: str | None,
    limit: int | None,
    exit_code: bool,
    pretrained: bool,
    model_args: tuple[tuple[str, Any], ...],
    trust_factory: bool,
    input_size: tuple[int, ...] | None,
) -> None:
    """Show what changed from model A to model B.

    A and B are timm names, saved conversions (as converted) or package.module:factory. A saved conversion alone means
    its original against the converted model. Models without weights of their own are built from the same random seed.

    With --exit-code it ends as diff does: with 0 if the models are the same, 1 if they differ, 2 on any failure.
    """
    from ilmconvert_cli.writing import check_file, write_file

    form = _format(form, output)
    _check_options(form, output, force, unfold, summary, block)
    if output is not None:
        check_file(output, force=force)  # before any work is done
    pair = open_pair(
        a, b, pretrained=pretrained, model_args=model_args, trust_factory=trust_factory, values=bool(numerics)
    )
    result = _compare(pair, numerics, limit, input_size)
    width = _WIDTH if output is not None else max(shutil.get_terminal_size((_WIDTH, 1)).columns, _NARROWEST)
    content = _render(result, form, width=width, unfold=unfold, summary=summary, block=block)
    if output is not None:
        write_file(output, content, force=force)
    else:
        _print(content, form)
    context.exit(1 if exit_code and not result.equal else 0)


def _format(form: str | None, output: Path | None) -> str:
    """The format asked for, or the one that the file's ending means."""
    endings = {".txt": "text", ".diff": "unified", ".patch": "unified", ".md": "markdown", ".htm": "html"}
    endings |= {f".{form}": form for form in ("json", "html", "svg", "png")}
    if form is not None or output is None:
        return form or "text"
    if output.suffix.lower() not in endings:
        raise UsageError(f"expected --output FILE ending in {', '.join(endings)}, or --format; got {output.name!r}")
    return endings[output.suffix.lower()]


def _check_options(form: str, output: Path | None, force: bool, unfold: bool, summary: bool, block: str | None) -> None:
    if force and output is None:
        raise UsageError("expected --force with --output FILE, which it replaces")
    if (unfold or summary) and form != "text":
        raise UsageError(f"expected --all and --summary with --format text, got {form}")
    if unfold and summary:
        raise UsageError("expected --all or --summary, got both")
    if block is not None and form not in ("svg", "png"):
        raise UsageError(f"expected --block with --format svg or png, got {form}")
    if form == "png" and output is None:
        raise UsageError("expected --output FILE with --format png; an image cannot be printed")


def _compare(pair: Pair, numerics: str | None, limit: int | None, input_size: tuple[int, ...] | None) -> GraphDiff:
    from ilmconvert_cli.render.progress import progress_bar

    import ilmconvert
    from ilmconvert.comparison.batches import folder_batches, random_batches
    from ilmconvert.graph import example_inputs

    batches = None
    if numerics == "random":
        batches = random_batches(pair.a, samples=limit, input_size=input_size)
    elif numerics is not None:
        batches = folder_batches(numerics, pair.a, limit=limit, input_size=input_size)
    elif limit is not None:
        raise UsageError("expected --limit with --numerics")
    inputs = None if input_size is None else example_inputs(pair.a, input_size=input_size, batch_size=1)
    with progress_bar() as progress:
        return ilmconvert.diff(
            pair.a, pair.b, example_inputs=inputs, numerics=batches, names=pair.names, progress=progress
        )


def _render(diff: GraphDiff, form: str, *, width: int, unfold: bool, summary: bool, block: str | None) -> str | bytes:
    if form in ("svg", "png"):
        return diff.to_image("png" if form == "png" else "svg", block=block)
    if summary:
        return diff.to_summary(width=width)
    makers: dict[str, Callable[[], str]] = {
        "text": lambda: diff.to_text(unfold=unfold, width=width),
        "unified": diff.to_unified,
        "markdown": diff.to_markdown,
        "json": lambda: json.dumps(diff.to_dict(), indent=1, allow_nan=False) + "\n",
        "html": diff.to_html,
    }
    return makers[form]()


def _print(content: str | bytes, form: str) -> None:
    from ilmconvert_cli.render.diff import print_diff

    if form == "text" and isinstance(content, str):
        print_diff(content)
    else:
        click.echo(content, nl=False)
