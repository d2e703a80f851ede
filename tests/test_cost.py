"""What a conversion may cost, counted: calls, comparisons, bytes. No timing."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ilmconvert
from ilmconvert.graph.sites import Site
from ilmconvert.options import ConvertOptions
from ilmconvert.plan import Decision, Plan

SIZES = (100, 500, 2000)


class Call(nn.Module):
    """A norm that is a function call."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, (8,), self.weight)


class Untraceable(nn.Module):
    """Its norms are found piece by piece."""

    def __init__(self, norms: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)) for _ in range(norms))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers if x.sum() != 0 else ():
            x = layer(x)
        return x


class Tied(nn.Module):
    """One norm that runs many times."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.norm, self.times = nn.LayerNorm(8), times

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.times):
            x = self.norm(x)
        return x


def chain(make: Callable[[], nn.Module]) -> Callable[[int], nn.Module]:
    return lambda norms: nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), make()) for _ in range(norms)))


MODELS = {
    "layer": chain(lambda: nn.LayerNorm(8)),
    "batch": chain(lambda: nn.BatchNorm1d(8)),
    "call": chain(Call),
    "untraceable": Untraceable,
    "tied": Tied,
}


def calls(work: Callable[[], object]) -> int:
    """How many functions, Python's and built-in ones, ``work`` calls."""
    number = 0

    def count(_: object, event: str, __: object) -> None:
        nonlocal number
        number += event in ("call", "c_call")

    gc.collect()
    gc.disable()  # what it finds is not counted here
    sys.setprofile(count)
    try:
        work()
    finally:
        sys.setprofile(None)
        gc.enable()
    return number


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("sizes", [(5, 15, 40), pytest.param(SIZES, marks=pytest.mark.slow)], ids=str)
def test_calls_grow_with_the_number_of_norms_alone(kind: str, sizes: tuple[int, int, int]) -> None:
    few, some, many = sizes
    x = torch.randn(2, 8)
    ilmconvert.convert(MODELS[kind](2), example_inputs=x)  # imports and caches of torch
    a, b, c = (calls(partial(ilmconvert.convert, MODELS[kind](n), example_inputs=x)) for n in sizes)
    assert (c - b) / (many - some) <= 1.1 * (b - a) / (some - few)


class Path(str):
    """A text that counts how often it is compared."""

    compared = 0
    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        Path.compared += 1
        return str.__eq__(self, other)


def test_a_plan_does_not_compare_each_path_with_all_others() -> None:
    Path.compared = 0
    decisions = tuple(Decision(Site((Path(f"layers.{i}"),), "Norm"), "skip", code="x") for i in range(2000))
    Plan(ConvertOptions(), decisions, "Model")
    assert Path.compared <= 2000


PEAK = """
import re, torch, ilmconvert
from pathlib import Path
from torch import nn

def peak():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

def make(width):
    blocks = [nn.Sequential(nn.Linear(width, width), nn.LayerNorm(width), nn.BatchNorm1d(width)) for _ in range(4)]
    return nn.Sequential(*blocks)

x = torch.randn(2, 2048)
ilmconvert.{convert}(make(2048), example_inputs=x)  # imports, and what torch allocates once
model = make(4096)
size = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
before = peak()
conversion = ilmconvert.{convert}(model, example_inputs=torch.randn(2, 4096))
print((peak() - before) / size)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("convert", "copies"), [("convert", 1), ("convert_", 0)])
def test_peak_memory_is_one_copy_or_none(convert: str, copies: float) -> None:
    code = PEAK.format(convert=convert)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert copies - 0.05 <= float(result.stdout) <= copies + 0.02


def test_a_shadow_is_gone_when_the_search_is_over() -> None:
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(50)), nn.LayerNorm(8))
    ilmconvert.inspect(model, example_inputs=torch.randn(2, 8))
    before = sum(type(o) is nn.Linear for o in gc.get_objects())
    gc.disable()
    try:
        ilmconvert.inspect(model, example_inputs=torch.randn(2, 8))
        assert sum(type(o) is nn.Linear for o in gc.get_objects()) == before
        assert not gc.isenabled()
    finally:
        gc.enable()
    ilmconvert.inspect(model)
    assert gc.isenabled()
