"""What a model is called with: its own copies, and the same random numbers every time."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ilmconvert.graph import Inputs


class Greedy(nn.Module):
    """Changes its inputs, draws random numbers, and asks whether two of its arguments are one."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x.add_(1) + torch.rand_like(x) + (100 if x is y else 0)


def test_inputs_are_the_models_own_and_random_numbers_the_same() -> None:
    model, x = Greedy(), torch.zeros(2, 3)
    torch.manual_seed(7)
    state = torch.get_rng_state()
    for given, offset in ((Inputs((x, x)), 101), (Inputs((x, x.clone())), 1)):
        first, second = given.outputs(model)[0], given.outputs(model)[0]
        assert torch.equal(first, second)
        assert bool(((first >= offset) & (first < offset + 1)).all())
        assert first.unique().numel() == first.numel()
    assert not x.any()
    assert torch.equal(torch.get_rng_state(), state)
