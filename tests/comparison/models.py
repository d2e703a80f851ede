"""Models that renderers are shown."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import ilmconvert
from ilmconvert.comparison import GraphDiff

LONG = "very_long_" * 30
HOSTILE = (
    "<script>alert(1)</script>",
    "\"quoted\" 'name'",
    "</script><!--",
    "line\nbreak\x1b[31m",
    "größe_层_🙂\u202e",
    "a|b`c``d*e_f[g](h)",
    "${x} `${y}` \\u003c",
    LONG,
)


class Run(nn.Module):
    """Runs its children in order."""

    def forward(self, x: Tensor) -> Tensor:
        for child in self.children():
            x = child(x)
        return x


def hostile() -> tuple[nn.Module, nn.Module]:
    """Two models with names that try to break out of whatever they are put into."""

    def model(norm: type[nn.Module]) -> nn.Module:
        root = Run()
        for name in HOSTILE:
            child = type(f"Class {name}", (Run,), {})()
            child.note = name
            child.add_module("conv", nn.Conv2d(4, 4, 1))
            child.add_module(name, norm())
            root.add_module(name, child)
        return root

    return model(lambda: nn.BatchNorm2d(4)), model(lambda: nn.GroupNorm(2, 4))  # type: ignore[arg-type]


def hostile_diff() -> GraphDiff:
    a, b = hostile()
    x = torch.randn(2, 4, 5, 5)
    return ilmconvert.diff(a, b, example_inputs=x, numerics=x, names=("<img src=x onerror=alert(1)>", 'b\' & "c"'))


class Small(nn.Module):
    """A stem, repeated blocks with a residual, a head."""

    def __init__(self, width: int = 8, depth: int = 3) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())
        self.blocks = nn.Sequential(*(Block(width) for _ in range(depth)))
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(width, width, 1), nn.BatchNorm2d(width), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)) + x)


class Other(Small):
    """:class:`Small` with every kind of change."""

    def __init__(self) -> None:
        super().__init__(8, 2)
        self.blocks[0].norm = nn.GroupNorm(2, 8)
        self.blocks[1].conv = nn.Conv2d(8, 8, 1, bias=False)
        self.stem.insert(1, nn.MaxPool2d(1))
        self.classifier = self.head
        del self.head

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.blocks(self.stem(x)).mean((2, 3)))


def every_kind() -> GraphDiff:
    torch.manual_seed(0)
    return ilmconvert.diff(Small(), Other(), example_inputs=torch.zeros(1, 3, 8, 8), names=("small", "other"))


def shifted() -> GraphDiff:
    """A block that moved into another, and a class of the same name from another module."""

    def run(**children: nn.Module) -> Run:
        made = Run()
        for name, child in children.items():
            made.add_module(name, child)
        return made

    def act(module: str) -> nn.Module:
        return type("Act", (nn.Module,), {"forward": lambda self, x: x.relu(), "__module__": module})()

    a = run(
        left=run(conv=nn.Conv2d(4, 4, 1), extra=Block(4), pool=nn.MaxPool2d(1), norm=nn.BatchNorm2d(4)),
        right=run(conv=nn.Conv2d(4, 4, 1), act=act("one")),
    )
    b = run(
        left=run(conv=nn.Conv2d(4, 4, 1), pool=nn.MaxPool2d(1), norm=nn.BatchNorm2d(4)),
        right=run(conv=nn.Conv2d(4, 4, 1), more=Block(4), act=act("two")),
    )
    return ilmconvert.diff(a, b, names=("a", "b"))
