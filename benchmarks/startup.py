"""What starting and converting cost: the command's help, conversion over building, many norms, memory.

Run: ``python -m benchmarks.startup``. Times are ratios, both sides in turn in one process, medians; memory is the peak
of a process of its own.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from functools import partial

import timm
import torch
from torch import nn

import ilmconvert
from benchmarks.common import interleaved, peak, write

MODELS = ("resnet50", "vit_large_patch16_224", "efficientnet_b7")
NORMS = (100, 500, 2000)


def run(*arguments: str) -> Callable[[], object]:
    return lambda: subprocess.run([sys.executable, *arguments], check=True, capture_output=True)


def row(what: str, over: str, ratio: float) -> dict[str, object]:
    return {"what": what, "over": over, "ratio": ratio}


def starting(flag: str) -> dict[str, object]:
    ratio, _ = interleaved([run("-m", "ilmconvert", flag), run("-c", "pass")], runs=15)
    return row(f"ilmconvert {flag}", "python -c pass", ratio)


def converting(name: str) -> dict[str, object]:
    model = timm.create_model(name)
    ratio, _ = interleaved([lambda: ilmconvert.convert(model), lambda: timm.create_model(name)], runs=15, warmup=1)
    return row(f"convert({name})", "building it", ratio)


def chain(norms: int) -> nn.Module:
    return nn.Sequential(*[nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.ReLU()) for _ in range(norms)])


def scaling() -> list[dict[str, object]]:
    x, models = torch.randn(2, 8), [chain(norms) for norms in reversed(NORMS)]
    steps = [partial(ilmconvert.convert, model, example_inputs=x) for model in models]
    ratios = interleaved(steps, runs=3, warmup=1)
    few = NORMS[0]
    return [
        row(f"{norms} norms, per norm", f"{few} norms", ratio * few / norms)
        for norms, ratio in zip(reversed(NORMS), ratios, strict=True)
        if norms != few
    ]


def memory(convert: str, name: str) -> dict[str, object]:
    command = [sys.executable, "-m", "benchmarks.startup", convert, name]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    return row(f"peak extra memory of {convert}({name})", "the model's bytes", float(result.stdout))


def measure_memory(convert: str, name: str) -> None:
    """In a fresh process: how far the peak of resident memory rises, over the model's size."""
    work = getattr(ilmconvert, convert)
    work(timm.create_model("test_resnet"))  # imports, and what torch allocates once
    model = timm.create_model(name)
    size = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    before = peak()
    conversion = work(model)
    assert conversion.report.converted
    print((peak() - before) / size)


def main() -> None:
    rows = [starting(flag) for flag in ("--help", "--version")]
    rows += [converting(name) for name in MODELS]
    rows += scaling()
    rows += [memory(convert, name) for name in MODELS for convert in ("convert", "convert_")]
    write("startup", rows)


if __name__ == "__main__":
    measure_memory(*sys.argv[1:]) if sys.argv[1:] else main()
