"""Output differences of converted GroupNorm, LayerNorm and RMSNorm models, with random scale and shift.

Run: ``python -m benchmarks.preserve``.
"""

from __future__ import annotations

import timm
import torch

import ilmconvert
from benchmarks.common import write
from tests.helpers import randomize_norms, relative
from tests.zoo.test_preserve import MODELS


@torch.no_grad()
def measure(name: str) -> dict[str, object]:
    torch.manual_seed(0)
    model = randomize_norms(timm.create_model(name)).eval()
    conversion = ilmconvert.convert(model)
    converted = conversion.model
    x = torch.randn(2, *model.pretrained_cfg["input_size"])
    row: dict[str, object] = {"model": name, "norms": len(conversion.report.converted)}
    row["float32"] = relative(model(x), converted(x))
    last = x.to(memory_format=torch.channels_last)
    row["channels_last"] = relative(
        model.to(memory_format=torch.channels_last)(last), converted.to(memory_format=torch.channels_last)(last)
    )
    row["float64"] = relative(model.double()(x.double()), converted.double()(x.double()))
    return row


if __name__ == "__main__":
    write("preserve", [measure(name) for name in MODELS], measure="largest absolute difference / largest output")
