"""What starting and converting cost: the command's help, conversion over building, and many norms.

Run: ``python -m benchmarks.startup``. Ratios of wall times, both sides in turn, medians.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import timm
import torch
from torch import nn

import ilmconvert
from benchmarks.common import interleaved, write

MODELS = ("resnet50", "vit_large_patch16_224", "efficientnet_b7")


def run(*arguments: str) -> Callable[[], object]:
    return lambda: subprocess.run([sys.executable, *arguments], check=True, capture_output=True)


def chain(norms: int) -> nn.Module:
    return nn.Sequential(*[nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.ReLU()) for _ in range(norms)])


def main() -> None:
    rows = []
    for flag in ("--help", "--version"):
        ratio, _ = interleaved([run("-m", "ilmconvert", flag), run("-c", "pass")], runs=15)
        rows.append({"what": f"ilmconvert {flag} over python -c pass", "ratio": ratio})
    for name in MODELS:
        model = timm.create_model(name)
        steps: list[Callable[[], object]] = [
            lambda: ilmconvert.convert(model),  # noqa: B023  (called before the next model)
            lambda: timm.create_model(name),  # noqa: B023
        ]
        ratio, _ = interleaved(steps, runs=5, warmup=1)
        rows.append({"what": f"converting {name} over building it", "ratio": ratio})
    x = torch.randn(2, 8)
    models = {norms: chain(norms) for norms in (100, 500, 2000)}
    for norms in (500, 2000):
        steps = [lambda m=models[n]: ilmconvert.convert(m, example_inputs=x) for n in (norms, 100)]  # type: ignore[misc]
        ratio, _ = interleaved(steps, runs=3, warmup=1)
        rows.append({"what": f"converting {norms} norms over 100 norms, per norm", "ratio": ratio * 100 / norms})
    write("startup", rows)


if __name__ == "__main__":
    main()
