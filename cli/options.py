"""Options that several commands share."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

__all__ = [
    "CONVERSION_FIELDS",
    "conversion_options",
    "input_size_option",
    "json_option",
    "model_arg_option",
    "model_options",
    "pretrained_option",
    "trust_factory_option",
]

CONVERSION_FIELDS = (
    "bn_to",
    "num_groups",
    "group_size",
    "key_group_size",
    "reduction",
    "mode",
    "gains",
    "include",
    "exclude",
    "norms",
    "skip_norms",
)

Command = TypeVar("Command", bound=Callable[..., Any])


class InputSize(click.ParamType):  # type: ignore[type-arg]
    """``3,224,224`` or ``3x224x224``: one sample, without the batch dimension."""

    name = "C,H,W"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        """Parse the numbers."""
        try:
            size = tuple(int(part) for part in str(value).replace("x", ",").split(","))
        except ValueError:
            size = ()
        if not size or min(size) < 1:
            self.fail(f"expected sizes such as 3,224,224 (one sample, no batch dimension), got {value!r}", param, ctx)
        return size


class KeyValue(click.ParamType):  # type: ignore[type-arg]
    """``KEY=VALUE``, the value in JSON if it parses, otherwise text."""

    name = "KEY=VALUE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, Any]:
        """Split at the first equals sign."""
        key, equals, text = str(value).partition("=")
        if not equals or not key.isidentifier():
            self.fail(f"expected KEY=VALUE such as num_classes=10, got {value!r}", param, ctx)
        try:
            return key, json.loads(text)
        except ValueError:
            return key, text


def _all(*decorators: Callable[[Command], Command]) -> Callable[[Command], Command]:
    def decorate(command: Command) -> Command:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return decorate


input_size_option = click.option(
    "--input-size", type=InputSize(), help="Shape of one sample; timm models declare their own."
)
trust_factory_option = click.option(
    "--trust-factory", is_flag=True, help="Call the factory that a saved folder names. Only for folders you trust."
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")

pretrained_option = click.option("--pretrained", is_flag=True, help="Load timm's pretrained weights (downloads them).")
model_arg_option = click.option(
    "--model-arg", "model_args", type=KeyValue(), multiple=True, help="Argument for building MODEL; repeatable."
)

model_options = _all(
    click.argument("model"),
    pretrained_option,
    click.option(
        "--checkpoint",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="Load weights from a safetensors or torch file (read with weights_only=True).",
    ),
    model_arg_option,
    trust_factory_option,
    input_size_option,
)

conversion_options = _all(
    click.option(
        "--bn-to",
        type=click.Choice(["layer", "group", "instance"]),
        default="layer",
        show_default=True,
        help="Grouping that replaces Batch Norm. 'layer' is what calibration recovers best.",
    ),
    click.option("--groups", "num_groups", type=int, metavar="N", help="Groups for --bn-to group.  [default: 32]"),
    click.option(
        "--group-size", type=int, metavar="N", help="Channels per group for --bn-to group, instead of --groups."
    ),
    click.option("--key-group-size", type=int, default=16, show_default=True, help="Channels per key group."),
    click.option("--reduction", type=int, default=16, show_default=True, help="Key groups per unit of the embedding."),
    click.option(
        "--mode",
        type=click.Choice(["preserve", "paper"]),
        default="preserve",
        show_default=True,
        help="Start from the model's function, or from the paper's initialisation.",
    ),
    click.option("--gains", is_flag=True, help="Learn factors on the predictions (an extension of the paper)."),
    click.option("--include", multiple=True, metavar="PATTERN", help="Convert only norms at these paths; repeatable."),
    click.option("--exclude", multiple=True, metavar="PATTERN", help="Leave norms at these paths; repeatable."),
    click.option("--norm", "norms", multiple=True, metavar="NAME", help="Convert only these families or classes."),
    click.option("--skip-norm", "skip_norms", multiple=True, metavar="NAME", help="Leave these families or classes."),
)
