"""What several test files need."""

from __future__ import annotations

import resource
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

needs_dot = pytest.mark.skipif(shutil.which("dot") is None, reason="needs graphviz's dot: apt-get install graphviz")


@torch.no_grad()
def randomize_norms(model: nn.Module) -> nn.Module:
    """Give every norm's scale and shift values that are not the trivial ones and zeros."""
    for module in model.modules():
        if "norm" in type(module).__name__.lower():
            for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
                if name == "weight":
                    tensor.uniform_(0.5, 1.5)
                elif name in ("bias", "running_mean"):
                    tensor.normal_(0, 0.3)
                elif name == "running_var":
                    tensor.uniform_(0.3, 2.0)
    return model


def same_state(a: nn.Module, b: nn.Module) -> bool:
    """Whether two state dicts have the same keys in the same order and the same bits."""
    x, y = a.state_dict(), b.state_dict()
    return list(x) == list(y) and all(torch.equal(x[k], y[k]) and x[k].dtype == y[k].dtype for k in x)


def relative(a: Tensor, b: Tensor) -> float:
    """Largest absolute difference relative to the largest absolute value of ``a``."""
    return ((a.double() - b.double()).abs().max() / a.double().abs().max().clamp_min(1e-30)).item()


def all_finite(tensors: Iterable[Tensor | None]) -> bool:
    """Whether all given tensors are finite."""
    return all(bool(torch.isfinite(t).all()) for t in tensors if t is not None)


@contextmanager
def full_disk(most: int) -> Iterator[None]:
    """A disk that refuses files of more bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
