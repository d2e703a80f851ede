"""Copies of a model are what copy.deepcopy makes of it."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from ilmconvert.graph.shadow import copy_model


class Shares(nn.Module):
    """Buffers and attributes that share memory in every way, and some that a clone would not be equal to."""

    def __init__(self) -> None:
        super().__init__()
        whole = torch.arange(12.0)
        self.register_buffer("part", whole[3:7])
        self.register_buffer("whole", whole)
        self.register_buffer("again", whole)
        self.register_buffer("matrix", whole.view(3, 4))
        self.norm = nn.BatchNorm1d(3)
        self.norm.running_mean = whole[:3]
        self.held = [whole]
        self.weight = nn.Parameter(torch.ones(2))
        first = torch.zeros(2, 3)
        self.register_buffer("first", first)
        self.register_buffer("flat", first.view(6))
        self.register_buffer("transposed", torch.randn(3, 4).T)
        self.register_buffer("conjugate", torch.randn(2, dtype=torch.complex64).conj())
        self.register_buffer("empty", torch.empty(0))
        marked = torch.randn(2)
        marked.note = "kept"  # type: ignore[attr-defined]
        self.register_buffer("marked", marked)


def test_copies_share_memory_as_the_model_does() -> None:
    model = Shares()
    for copied in (copy_model(model), copy.deepcopy(model)):
        named = copied.state_dict(keep_vars=True)
        for name, tensor in model.state_dict(keep_vars=True).items():
            own = named[name]
            assert torch.equal(own, tensor)
            assert type(own) is type(tensor)
            assert own.data_ptr() != tensor.data_ptr() or not tensor.numel()
            assert own.stride() == tensor.stride()
        whole: Tensor = named["whole"]
        assert named["again"] is whole is copied.held[0]
        assert named["marked"].note == "kept"
        whole += 100
        named["first"][1, 2] = 7
        assert named["flat"].tolist() == [0, 0, 0, 0, 0, 7]
        shared = (named["part"], torch.arange(103.0, 107.0)), (named["norm.running_mean"], torch.arange(100.0, 103.0))
        for tensor, expected in (*shared, (named["matrix"], torch.arange(100.0, 112.0).view(3, 4))):
            assert torch.equal(tensor, expected)
    assert model.whole[0] == 0
