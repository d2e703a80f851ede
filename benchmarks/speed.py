"""What ILM-Norm costs over the norm beneath it: ratios of medians, measured in turn in one process.

Run: ``python -m benchmarks.speed [layers] [compiled] [models]`` (all without arguments; two threads).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import timm
import torch
from torch import nn

import ilmconvert
from benchmarks.authors import AuthorsGroupNorm
from benchmarks.common import interleaved, run_parts, training_step, write
from ilmconvert.nn import ILMNorm, Standardization

IMAGES = ((8, 256, 56, 56), (32, 512, 28, 28), (8, 2048, 7, 7), (32, 64, 112, 112))
TOKENS = ((16, 197, 768), (8, 3136, 96))


def speaking(layer: ILMNorm) -> ILMNorm:
    """Decoders that are not zero, as after training."""
    for parameter in layer.predictor.parameters():
        nn.init.normal_(parameter, std=0.1)
    return layer


def token_layer(width: int) -> ILMNorm:
    return speaking(ILMNorm(width, standardization=Standardization(layout="token")))


def geometric_mean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def with_mean(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows and their geometric mean."""
    means = {title: geometric_mean([row[title] for row in rows]) for title in list(rows[0])[1:]}
    return [*rows, {"shape": "geometric mean", **means}]


def layers() -> None:
    rows: list[dict[str, Any]] = []
    for shape in IMAGES:
        x, channels = torch.randn(shape), shape[1]
        modules = (speaking(ILMNorm(channels, 32)), AuthorsGroupNorm(channels), nn.GroupNorm(32, channels))
        ours, theirs, _ = interleaved([training_step(m, x) for m in modules])
        last = x.to(memory_format=torch.channels_last)
        channels_last, _ = interleaved([training_step(m, last) for m in (modules[0], modules[2])])
        rows.append(
            {
                "shape": str(shape),
                "ILM / GroupNorm": ours,
                "authors' / GroupNorm": theirs,
                "authors' / ILM": theirs / ours,
                "ILM / GroupNorm, channels_last": channels_last,
            }
        )
    write("speed_layers", with_mean(rows), unit="forward and backward, float32, eager")
    tokens = []
    for shape in TOKENS:
        modules = (token_layer(shape[-1]), token_layer(shape[-1]), nn.LayerNorm(shape[-1]))
        torch._dynamo.reset()
        modules[1].compile()
        x = torch.randn(shape)
        ours, alone, _ = interleaved([training_step(m, x) for m in modules], runs=101)
        tokens.append({"shape": str(shape), "ILM / LayerNorm": ours, "ILM compiled alone / LayerNorm": alone})
    write("speed_tokens", tokens, unit="forward and backward, float32, eager")


def compiled() -> None:
    rows: list[dict[str, Any]] = []
    for shape in (*IMAGES, *TOKENS):
        x = torch.randn(shape)
        image = shape in IMAGES
        ours: nn.Module = speaking(ILMNorm(shape[1], 32)) if image else token_layer(shape[-1])
        base: nn.Module = nn.GroupNorm(32, shape[1]) if image else nn.LayerNorm(shape[-1])
        torch._dynamo.reset()  # or the variants of earlier shapes exhaust the recompilation limit
        steps = [training_step(torch.compile(m, fullgraph=True), x) for m in (ours, base)]
        steps.insert(1, training_step(ours, x))
        fast, eager, _ = interleaved(steps, runs=21 if image else 101)
        rows.append(
            {"shape": str(shape), "compiled ILM / compiled base": fast, "compiled ILM / eager ILM": fast / eager}
        )
    unit = "forward and backward, float32, torch.compile (inductor)"
    write("speed_compiled", with_mean(rows[: len(IMAGES)]), unit=unit)
    write("speed_compiled_tokens", rows[len(IMAGES) :], unit=unit)


def with_group_norm(model: nn.Module) -> nn.Module:
    """Every BatchNorm replaced by GroupNorm of one group, the grouping of the converted model."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.BatchNorm2d):
            model.set_submodule(name, nn.GroupNorm(1, module.num_features))
    return model


def models() -> None:
    rows: list[dict[str, Any]] = []
    resnet, vit = timm.create_model("resnet50"), timm.create_model("vit_small_patch16_224")
    cases = {
        "resnet50, batch 8, 128 px": (
            torch.randn(8, 3, 128, 128),
            {"BatchNorm": resnet, "base": with_group_norm(timm.create_model("resnet50"))},
            ilmconvert.convert(resnet).model,
        ),
        "vit_small, batch 8, 224 px": (torch.randn(8, 3, 224, 224), {"base": vit}, ilmconvert.convert(vit).model),
    }
    for name, (x, others, converted) in cases.items():
        modules = [converted, *others.values()]
        train = interleaved([training_step(m.train(), x) for m in modules], runs=41, warmup=2)
        infer = interleaved([inference(m.eval(), x) for m in modules], runs=41, warmup=2)
        for mode, ratios in (("training step", train), ("inference", infer)):
            batch_norm = ratios[1] if "BatchNorm" in others else None
            rows.append({"model": name, "what": mode, "converted / base": ratios[0], "BatchNorm / base": batch_norm})
    write("speed_models", rows, base="the same network with GroupNorm (resnet50) or LayerNorm (vit_small)")


def inference(model: nn.Module, x: torch.Tensor) -> Callable[[], object]:
    @torch.inference_mode()
    def step() -> None:
        model(x)

    return step


if __name__ == "__main__":
    torch.set_num_threads(2)
    run_parts({"layers": layers, "compiled": compiled, "models": models})
