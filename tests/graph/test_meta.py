"""What meta tensors answer is what real ones would; where they cannot, fake ones are asked."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ilmconvert.graph import example_inputs, find_sites
from ilmconvert.graph.meta import MetaMode

x = torch.randn(2, 8, 6, 6)
vector, square = torch.rand(8), torch.rand(8, 8)
KNOWN: dict[str, tuple[Callable[..., Tensor], tuple, dict]] = {
    "relu": (F.relu, (x,), {}),
    "hardtanh": (F.hardtanh, (x,), {"inplace": False}),
    "gelu of transposed": (F.gelu, (x.transpose(1, 2),), {}),
    "silu of channels last": (F.silu, (x.to(memory_format=torch.channels_last),), {}),
    "relu of expanded": (F.relu, (x[:1].expand(2, 8, 6, 6),), {}),
    "add": (Tensor.add, (x, x), {}),
    "add broadcast": (Tensor.add, (x, x[:, :1]), {}),
    "add promoted": (Tensor.add, (x, x.double()), {}),
    "add a number": (Tensor.add, (x, 1), {"alpha": 2}),
    "batch_norm": (F.batch_norm, (x, vector, vector, vector, vector), {"training": True}),
    "batch_norm of channels last": (F.batch_norm, (x.to(memory_format=torch.channels_last), vector, vector), {}),
    "group_norm": (F.group_norm, (x, 4), {"weight": vector, "bias": vector}),
    "layer_norm": (F.layer_norm, (x, [6, 6]), {}),
    "layer_norm of transposed": (F.layer_norm, (x.transpose(1, 3), (8,), vector, vector), {}),
    "linear": (F.linear, (x.transpose(1, 3), square, vector), {}),
    "attention": (F.scaled_dot_product_attention, (x, x, x), {}),
    "attention with a mask": (F.scaled_dot_product_attention, (x, x, x, torch.ones(6, 6) > 0), {}),
    "attention of other widths": (F.scaled_dot_product_attention, (x[..., :4], x[..., :4], x), {}),
    "arange": (torch.arange, (4,), {"device": "cpu"}),
}
RAISE: dict[str, tuple[Callable[..., Tensor], tuple, dict]] = {
    "batch_norm of one value": (F.batch_norm, (x[:1, :, 0, 0], vector, vector), {"training": True}),
    "batch_norm of other channels": (F.batch_norm, (x, vector[:4], vector[:4]), {}),
    "group_norm": (F.group_norm, (x, 3), {}),
    "layer_norm": (F.layer_norm, (x, (5,)), {}),
    "linear": (F.linear, (x, square), {}),
    "linear of another dtype": (F.linear, (x.transpose(1, 3).double(), square), {}),
    "attention": (F.scaled_dot_product_attention, (x, x[..., :4], x), {}),
}


def on_meta(call: Callable[..., Tensor], args: tuple, kwargs: dict) -> Tensor:
    mode = MetaMode(torch.device("cpu"))
    args, kwargs = torch.utils._pytree.tree_map_only(Tensor, mode.from_tensor, (args, kwargs))
    with torch.no_grad(), mode:
        return call(*args, **kwargs)


@pytest.mark.parametrize("name", KNOWN)
def test_shape_dtype_and_layout_are_those_of_the_real_result(name: str) -> None:
    call, args, kwargs = KNOWN[name]
    meta, real = on_meta(call, args, kwargs), call(*args, **kwargs)
    assert meta.is_meta
    assert (meta.shape, meta.dtype) == (real.shape, real.dtype)
    if "attention" not in name:
        assert meta.stride() == real.stride()


@pytest.mark.parametrize("name", RAISE)
def test_what_raises_still_raises(name: str) -> None:
    for run in (on_meta, lambda call, args, kwargs: call(*args, **kwargs)):
        with pytest.raises((RuntimeError, ValueError)):
            run(*RAISE[name])


def test_tensors_say_that_they_are_where_the_model_is() -> None:
    mode = MetaMode(torch.device("cuda", 1))
    with mode:
        made = torch.zeros(3)
        assert (made.device, made.is_cuda, made.is_cpu, made.is_meta) == (torch.device("cuda", 1), True, False, False)
        moved = [made.to("cpu"), made.cpu(), made.to(made.device), torch.ones(2, device=made.device), made.cuda()]
        with pytest.raises((RuntimeError, NotImplementedError)):
            made.sum().item()
    assert made.is_meta
    assert all(t.is_meta for t in moved)
    assert torch.zeros(1).is_cpu


class Needs(nn.Module):
    """Forward code that asks for a value, or for a real tensor of its own."""

    def __init__(self, *, own: bool) -> None:
        super().__init__()
        self.norm, self.offset = nn.LayerNorm(8), torch.ones(8) if own else None

    def forward(self, x: Tensor) -> Tensor:
        if self.offset is not None:
            return self.norm(x + self.offset)
        return self.norm(x) * torch.tensor(2).item()


@pytest.mark.parametrize("own", [True, False])
def test_fake_tensors_are_asked_where_meta_ones_do_not_suffice(own: bool) -> None:
    model = Needs(own=own)
    search = find_sites(model, example_inputs(model, torch.randn(3, 8)))
    assert search.run_error is None
    assert [(s.path, s.calls, s.input_shapes) for s in search.sites] == [("norm", 1, ((3, 8),))]
