"""Options that several commands share."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from ilmconvert.errors import UsageError
from ilmconvert.jsonable import parse_json

__all__ = [
    "Number",
    "calibration_options",
    "conversion_options",
    "given",
    "held_out_once",
    "input_size_option",
    "json_option",
    "model_arg_option",
    "model_options",
    "pretrained_option",
    "recovery_options",
    "teacher_options",
    "trust_factory_option",
]

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


class Number(click.types.FloatParamType):
    """A number; ``nan`` and ``inf`` are none."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Parse and check it."""
        number: float = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"expected a finite number, got {value!r}", param, ctx)
        return number


class NumberInRange(Number, click.FloatRange):
    """A number in a range, as click has it."""


class KeyValue(click.ParamType):  # type: ignore[type-arg]
    """``KEY=VALUE``, the value in JSON if it parses, otherwise text."""

    name = "KEY=VALUE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, Any]:
        """Split at the first equals sign."""
        key, equals, text = str(value).partition("=")
        if not equals or not key.isidentifier():
            self.fail(f"expected KEY=VALUE such as num_classes=10, got {value!r}", param, ctx)
        try:
            return key, parse_json(text)
        except ValueError:
            return key, text


def given(context: click.Context, *names: str) -> list[str]:
    """Those of a command's options that the user gave, as they are written."""
    return [
        option.opts[0]
        for option in context.command.params
        if option.name in names and context.get_parameter_source(option.name) is ParameterSource.COMMANDLINE
    ]


def held_out_once(context: click.Context) -> None:
    """Refuse a share to hold out beside images of their own, which would leave it without a meaning."""
    if len(both := given(context, "held_out", "held_out_images")) == 2:
        raise UsageError(f"expected {' or '.join(both)}, got both")


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
        help="Grouping that replaces Batch Norm.",
    ),
    click.option("--groups", "num_groups", type=int, metavar="N", help="Groups for --bn-to group.  [default: 32]"),
    click.option(
        "--group-size", type=int, metavar="N", help="Channels per group for --bn-to group, instead of --groups."
    ),
    click.option(
        "--key-group-size",
        type=int,
        metavar="N",
        help="Channels per key group.  [default: 16; for BatchNorm one key group for each group]",
    ),
    click.option(
        "--reduction",
        type=int,
        metavar="N",
        help="Key groups per unit of the embedding.  [default: 16; for BatchNorm two units each]",
    ),
    click.option(
        "--mode",
        type=click.Choice(["preserve", "paper"]),
        default="preserve",
        show_default=True,
        help="Start from the model's function, or from the paper's initialisation.",
    ),
    click.option(
        "--gains/--no-gains",
        default=None,
        help="Learn factors on the predictions (an extension of the paper).  [default: for BatchNorm only]",
    ),
    click.option("--include", multiple=True, metavar="PATTERN", help="Convert only norms at these paths; repeatable."),
    click.option("--exclude", multiple=True, metavar="PATTERN", help="Leave norms at these paths; repeatable."),
    click.option("--norm", "norms", multiple=True, metavar="NAME", help="Convert only these families or classes."),
    click.option("--skip-norm", "skip_norms", multiple=True, metavar="NAME", help="Leave these families or classes."),
)

teacher_options = _all(
    click.option("--teacher", metavar="MODEL", help="Learn from this model instead of DIR's own original."),
    click.option(
        "--teacher-checkpoint",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="The teacher's weights; without it, a timm name means its pretrained weights.",
    ),
)

calibration_options = _all(
    click.option("--limit", type=click.IntRange(1), default=256, show_default=True, help="Images to fit to."),
    click.option(
        "--held-out",
        type=NumberInRange(0, 1, min_open=True, max_open=True),
        default=0.2,
        show_default=True,
        help="Share of further images, to compare the two models on.",
    ),
    click.option(
        "--held-out-images",
        type=click.Path(path_type=Path),
        metavar="FOLDER",
        help="Compare on these images, instead of a share of --images.",
    ),
    click.option("--batch-size", type=click.IntRange(1), default=32, show_default=True, help="Images run together."),
    click.option(
        "--memory",
        type=NumberInRange(0, 1_000_000),
        default=2.0,
        show_default=True,
        help="GiB of activations to hold; what exceeds it waits on disk.",
    ),
    click.option("--seed", type=int, default=0, show_default=True, help="Of which images are taken."),
)

recovery_options = _all(
    click.option("--steps", type=int, metavar="N", help="Optimizer steps."),
    click.option(
        "--epochs", type=Number(), metavar="N", help="Passes over the images.  [default: 10 if no limit is given]"
    ),
    click.option(
        "--minutes", type=Number(), metavar="N", help="Wall time, all included. The first limit reached ends it."
    ),
    click.option(
        "--batch-size", type=int, default=32, show_default=True, help="Images in a step, shared by the processes."
    ),
    click.option("--lr", type=Number(), default=2e-4, show_default=True, help="Highest learning rate of AdamW."),
    click.option(
        "--meta-lr-scale", type=Number(), default=0.1, show_default=True, help="The same for meta parameters, relative."
    ),
    click.option(
        "--weight-decay",
        type=Number(),
        default=0.0,
        show_default=True,
        help="Of all but norms, biases, meta parameters.",
    ),
    click.option(
        "--warmup", type=Number(), default=0.05, show_default=True, help="Share of the run with a rising learning rate."
    ),
    click.option(
        "--clip", type=Number(), default=1.0, show_default=True, help="Largest gradient norm; 0 does not clip."
    ),
    click.option("--temperature", type=Number(), default=1.0, show_default=True, help="Of the distillation."),
    click.option(
        "--features", type=Number(), default=0.0, show_default=True, help="Weight of matching the norms' outputs too."
    ),
    click.option(
        "--label-smoothing", type=Number(), default=0.0, show_default=True, help="Of the cross-entropy, with --labels."
    ),
    click.option("--freeze", is_flag=True, help="Train the ILM layers alone."),
    click.option(
        "--augment",
        type=Number(),
        default=0.5,
        show_default=True,
        help="Strength of random crops, flips and colours, 0 to 1.",
    ),
    click.option(
        "--held-out", type=Number(), default=0.1, show_default=True, help="Share of the images to measure on."
    ),
    click.option("--evaluate-every", type=int, metavar="N", help="Steps between measurements.  [default: 20 in all]"),
    click.option(
        "--precision",
        type=click.Choice(["no", "bf16", "fp16"]),
        default="no",
        show_default=True,
        help="Automatic mixed precision.",
    ),
    click.option("--seed", type=int, default=0, show_default=True, help="Of order, augmentation and what is held out."),
    click.option("--workers", type=int, default=0, show_default=True, help="Processes that read images."),
    click.option("--fsdp", is_flag=True, help="Shard the training state over the processes, instead of DDP."),
    click.option("--cpu", is_flag=True, help="Use the CPU though there is a GPU."),
)
