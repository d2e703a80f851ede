"""NaN and infinity are found, and nothing else is taken for them."""

from __future__ import annotations

import torch
from torch import nn

from ilmconvert.finite import all_finite, not_finite


def test_finite_numbers_are_finite_whatever_their_sum_and_size() -> None:
    norm = nn.BatchNorm1d(1000).half()
    norm.running_var.fill_(100.0)  # 100,000 in all, which half precision does not hold
    norm.register_buffer("codes", torch.ones(8).to(torch.float8_e4m3fn))  # which torch does not add up
    assert not_finite(norm) == ()
    assert all_finite([norm])
    norm.running_mean[3] = float("nan")
    assert not_finite(norm) == ("running_mean",)
    assert not all_finite([norm])
