"""Write the real diffs in this folder: ``python docs/diffs/real_diffs.py``; ``--check`` tells whether they are stale.

Everything is read on the meta device: nothing is downloaded, and no memory is needed for weights.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import timm
import torch

import ilmconvert
from ilmconvert import GraphDiff

HERE = Path(__file__).parent


def converted(name: str) -> GraphDiff:
    """A timm model against its own conversion."""
    with torch.device("meta"):
        return ilmconvert.convert(timm.create_model(name)).diff()


def pair(a: str, b: str) -> GraphDiff:
    """Two timm models."""
    with torch.device("meta"):
        return ilmconvert.diff(timm.create_model(a), timm.create_model(b), names=(a, b))


def unrelated() -> GraphDiff:
    """Two architectures that were drawn at random, once: timm's list grows."""
    return pair("vit_small_r26_s32_224", "maxvit_base_tf_384")


PAGES: dict[str, Callable[[], str]] = {
    "resnet18-converted.txt": lambda: converted("resnet18").to_text(),
    "resnet18-converted.diff": lambda: converted("resnet18").to_unified(),
    "vit_tiny-converted.md": lambda: converted("vit_tiny_patch16_224").to_markdown(),
    "resnet50-resnet50d.txt": lambda: pair("resnet50", "resnet50d").to_text(),
    "resnet50-resnet50d.md": lambda: pair("resnet50", "resnet50d").to_markdown(),
    "unrelated.txt": lambda: unrelated().to_text(),
}

if __name__ == "__main__":
    made = {name: make() for name, make in PAGES.items()}
    stale = [n for n, text in made.items() if not (HERE / n).exists() or (HERE / n).read_text("utf-8") != text]
    if "--check" in sys.argv:
        sys.exit(f"out of date: {', '.join(stale)}; run python docs/diffs/real_diffs.py" if stale else 0)
    for name in stale:
        (HERE / name).write_text(made[name], encoding="utf-8")
