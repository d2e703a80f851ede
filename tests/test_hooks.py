"""Hooks on a norm fire on the layer that takes its place, in the same order."""

from __future__ import annotations

import torch
from torch import nn

import ilmconvert


def test_every_kind_of_hook_fires_as_before() -> None:
    model, seen = nn.Sequential(nn.Linear(4, 16), nn.LayerNorm(16)), []
    norm, x = model[1], torch.randn(2, 4)
    norm.register_forward_pre_hook(lambda *_: seen.append("pre"))
    norm.register_forward_pre_hook(lambda module, args, kwargs: seen.append("pre keywords"), with_kwargs=True)
    norm.register_forward_hook(lambda *_: seen.append("always"), always_call=True)
    norm.register_forward_hook(lambda module, args, kwargs, output: seen.append("keywords"), with_kwargs=True)
    norm.register_full_backward_pre_hook(lambda *_: seen.append("backward pre"))
    norm.register_full_backward_hook(lambda *_: seen.append("backward"))
    runs = []
    for each in (model, (conversion := ilmconvert.convert(model, example_inputs=x)).model, conversion.revert()):
        each(x).sum().backward()
        runs.append(tuple(seen))
        seen.clear()
    assert runs[0] == ("pre", "pre keywords", "always", "keywords", "backward pre", "backward")
    assert runs[1] == runs[2] == runs[0]
