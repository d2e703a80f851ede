"""What is read of a model: its tree, what runs, shapes, costs, and the pieces of what does not trace."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

import ilmconvert
from ilmconvert.comparison.reading import read_model
from ilmconvert.errors import ModelError, UsageError
from ilmconvert.graph import Inputs, example_inputs
from tests import models
from tests.comparison.models import Small


def test_a_small_model_is_read_completely() -> None:
    model = Small(width=8, depth=1)
    graph = read_model(model, Inputs((torch.zeros(2, 3, 6, 6),)))
    assert [n.path for n in graph.nodes] == [
        *("", "stem", "stem.0", "stem.1", "stem.2"),
        *("blocks", "blocks.0", "blocks.0.conv", "blocks.0.norm", "blocks.0:add", "blocks.0.act"),
        *(":mean", "head"),
    ]
    nodes = graph.by_path
    assert nodes["blocks.0:add"].inputs == ("blocks.0.norm", "stem.2")
    assert nodes[":mean"].attributes == {"arguments": "*, (2, 3)"}
    assert nodes["head"].inputs == (":mean",)
    assert nodes["head"].output_shapes == ((2, 5),)
    assert (nodes["stem.1"].role, nodes["stem.1"].attributes["eps"]) == ("norm", "1e-05")
    assert [(t.name, t.kind, t.shape) for t in nodes["stem.1"].tensors] == [
        ("weight", "parameter", (8,)),
        ("bias", "parameter", (8,)),
        ("running_mean", "buffer", (8,)),
        ("running_var", "buffer", (8,)),
        ("num_batches_tracked", "buffer", ()),
    ]
    convolutions = 2 * 36 * (8 * 3 * 9 + 8 * 8)
    assert graph.totals.macs == convolutions + 2 * 8 * 5
    assert graph.totals.parameters == sum(p.numel() for p in model.parameters())
    floats = sum(t.numel() for t in (*model.parameters(), *model.buffers()) if t.is_floating_point())
    assert graph.totals.parameter_bytes == 4 * floats + 2 * 8
    assert graph.totals.activation_bytes == 4 * (6 * 2 * 8 * 36 + 2 * 5)


def test_attention_is_counted() -> None:
    model = timm.create_model("test_vit")
    tokens, width, heads = 101, 64, 2
    block = tokens * width * (3 * width + width + 2 * 3 * width) + 2 * tokens * tokens * width
    assert model.blocks[0].attn.num_heads == heads
    graph = read_model(model, example_inputs(model, batch_size=1))
    assert graph.totals.macs == 6 * block + 100 * 3 * 16 * 16 * width + width * 1000


def test_untraceable_model_is_one_node_with_traced_pieces_below() -> None:
    graph = read_model(models.Branching(), Inputs((torch.randn(2, 8),)))
    assert graph.root.kind == "untraced"
    assert "symbolically traced" in graph.root.reason
    kinds = {n.path: n.kind for n in graph.nodes}
    assert kinds["stem.1"] == "module"
    assert {n.path for n in graph.nodes if n.role == "norm"} == {"stem.1", "heads.a.1", "heads.b"}
    diff = ilmconvert.convert(models.Branching()).diff()
    assert {r.path for r in diff.changed} == {"stem.1", "heads.a.1", "heads.b"}


def test_containers_without_a_forward_hide_nothing() -> None:
    class Lists(nn.Module):
        def __init__(self, eps: int) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Dropout(0.1 * eps)])
            self.named = nn.ModuleDict({"a": nn.Linear(4, 2)})
            self.idle = nn.Module()
            self.idle.inner = nn.Tanh()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = layer(x)
            return self.named["a"](x if float(x.sum()) > 0 else -x)

    graph = read_model(Lists(1))
    assert graph.root.kind == "untraced"
    assert {"layers.0", "layers.1", "named.a", "idle.inner"} <= set(graph.by_path)
    assert [r.path for r in ilmconvert.diff(Lists(1), Lists(2)).changed] == ["layers.1"]


def test_tied_and_repeated_modules_are_one_node() -> None:
    graph = read_model(models.TiedNorm(), Inputs((torch.zeros(1, 3, 4, 4),)))
    node = graph.by_path["norm1"]
    assert (node.aliases, node.calls) == (("block.1",), 2)
    assert "block.1" not in graph.by_path
    assert node.state_keys()[-1] == "block.1.num_batches_tracked"


def test_a_model_that_fails_is_read_all_the_same() -> None:
    graph = read_model(models.Failing(), Inputs((torch.zeros(1, 8, 2, 2),)))
    assert graph.run_error == "RuntimeError: no forward today"
    assert graph.totals.macs is None
    assert graph.by_path["norm"].role == "norm"


def test_the_model_is_left_as_it_is() -> None:
    model = models.Caching().train()
    ilmconvert.diff(model, model, example_inputs=torch.randn(2, 16), numerics=torch.randn(2, 16))
    assert model.seen is None
    assert model.training
    assert not model._forward_hooks


def test_unreadable_models_are_refused() -> None:
    with pytest.raises(ModelError, match="lazy module"):
        ilmconvert.diff(nn.LazyLinear(3), nn.Linear(2, 3))
    with pytest.raises(UsageError, match="got 'resnet18'; build it first"):
        ilmconvert.diff("resnet18", nn.ReLU())  # type: ignore[arg-type]
