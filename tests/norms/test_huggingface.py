"""transformers' own norm classes: the ILM layer built from each starts with its output."""

from __future__ import annotations

import importlib
import inspect

import pytest
import torch
from torch import nn

from ilmconvert.norms import Entry, build_ilm, entries, find
from ilmconvert.norms.build import Target
from tests.helpers import randomize_norms, relative

C = 24
NAMES = [name for name, entry in entries() if name.startswith("transformers.") and isinstance(entry, Entry)]
SOME = [  # one for each way of writing it
    "llama.modeling_llama.LlamaRMSNorm",
    "llama4.modeling_llama4.Llama4TextRMSNorm",
    "t5.modeling_t5.T5LayerNorm",
    "olmo2.modeling_olmo2.Olmo2RMSNorm",
    "moshi.modeling_moshi.MoshiRMSNorm",
    "gemma.modeling_gemma.GemmaRMSNorm",
    "detr.modeling_detr.DetrFrozenBatchNorm2d",
    "convnextv2.modeling_convnextv2.ConvNextV2LayerNorm",
    "eomt.modeling_eomt.EomtLayerNorm2d",
    "squeezebert.modeling_squeezebert.SqueezeBertLayerNorm",
]


def made(name: str) -> tuple[nn.Module, tuple[int, ...]]:
    """The norm with random values, and the shape of an input; channels first where it takes images."""
    module, _, cls = name.rpartition(".")
    kind = getattr(importlib.import_module(module), cls)
    image = (cls.endswith(("2d", "LayerNorm")) and issubclass(kind, nn.LayerNorm)) or "FrozenBatch" in cls
    given = {"data_format": "channels_first"} if "data_format" in inspect.signature(kind.__init__).parameters else {}
    norm = randomize_norms(kind(C, **given)).eval()
    if cls == "SqueezeBertLayerNorm":
        return norm, (3, C, 5)
    return norm, (2, C, 6, 5) if image else (3, 5, C)


def check(name: str) -> None:
    torch.manual_seed(0)
    norm, shape = made(name)
    entry = find(norm)
    assert isinstance(entry, Entry), entry
    spec = entry.handler.describe(norm)
    for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        norm.to(dtype)
        layer = build_ilm(norm, entry.handler, Target(spec.num_groups or 1, 2, 2))
        x = (torch.randn(shape) * 2 + 0.5).to(dtype)
        want, got = norm(x), layer(x)
        assert (got.dtype, got.shape) == (want.dtype, want.shape)
        if spec.preserves:
            assert relative(want, got) < bound


@pytest.mark.parametrize("name", SOME)
def test_layer_starts_with_the_norms_output(name: str) -> None:
    check(f"transformers.models.{name}")
    assert f"transformers.models.{name}" in NAMES


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_registered_class(name: str) -> None:
    check(name)


def test_weight_written_from_one_is_turned_into_the_scale() -> None:
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm

    norm = GemmaRMSNorm(C)
    layer = build_ilm(norm, find(norm).handler, Target(1, 2, 2))
    assert torch.equal(layer.weight, torch.ones(C))
    assert torch.equal(norm.weight, torch.zeros(C))
