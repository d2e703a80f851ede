"""Small models that real code looks like; also built by name, as ``tests.models:factory``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TiedNorm(nn.Module):
    """One norm under two names, called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 32, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(32)
        self.block = nn.Sequential(nn.Conv2d(32, 32, 1), self.norm1)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(torch.relu(self.norm1(self.conv(x)))).mean((2, 3))


class Branching(nn.Module):
    """Python control flow on tensor values: torch.fx cannot trace it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16))
        self.heads = nn.ModuleDict({"a": nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16)), "b": nn.RMSNorm(16)})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.stem(x)
        if x.shape[0] > 0 and float(x.detach().sum()) == float("inf"):
            x = x * 2
        return {"out": self.heads["b"](self.heads["a"](x))}


class AuxiliaryHead(nn.Module):
    """A norm that only training runs."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16))
        self.aux = nn.BatchNorm2d(16)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = self.body(x)
        return (x, self.aux(x)) if self.training else x


class Functional(nn.Module):
    """Norms that are calls, on an activation and on a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 3, 3, 3))
        self.norm = nn.GroupNorm(2, 8)

    def forward(self, x: Tensor) -> Tensor:
        flat = self.weight.reshape(1, 8, -1)
        weight = F.batch_norm(flat, None, None, training=True).reshape_as(self.weight)
        x = self.norm(F.conv2d(x, weight))
        return F.layer_norm(x, x.shape[-1:])


class Bypass(nn.Module):
    """Reads its norm's parameters instead of calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)

    def forward(self, x: Tensor) -> Tensor:
        if type(self.norm).__name__ == "LayerNorm":  # a name is not seen beforehand
            return self.norm(x)
        return F.layer_norm(x, (16,), self.norm.weight, self.norm.bias)


class Caching(nn.Module):
    """Remembers what it last saw, as some forward passes do."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.seen: object = None

    def forward(self, x: Tensor) -> Tensor:
        self.seen = x
        return self.norm(x)


class Failing(nn.Module):
    """Fails in every forward pass, after changing modes as some code does."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(2, 8)

    def forward(self, x: Tensor) -> Tensor:
        self.norm.train(False)
        raise RuntimeError("no forward today")


def small_cnn(channels: int = 16) -> nn.Module:
    """A convolutional network with Batch and Group Norm."""
    return nn.Sequential(
        nn.Conv2d(3, channels, 3, padding=1),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.Conv2d(channels, 2 * channels, 3, padding=1),
        nn.GroupNorm(4, 2 * channels),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(2 * channels, 5),
    )


def not_a_model() -> int:
    """Returns something else."""
    return 3


class OwnCall(nn.Module):
    """A norm function on parameters of its own, for 16 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.b = nn.Parameter(torch.rand(16) + 0.5), nn.Parameter(torch.randn(16))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, (16,), self.w, self.b)
