"""Calibration on a real pretrained BatchNorm network: what each extension and each choice contributes.

Run: ``python -m benchmarks.calibration`` (needs ``pip install -e '.[bench]'``). Calibration and held-out crops come
from different photographs.
"""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import ilmconvert
from benchmarks.common import agreement, crops, lite0, photographs, write
from benchmarks.start import copied
from ilmconvert.calibration.fitting import RIDGE
from ilmconvert.plan import Plan

HEADS: dict[str, dict[str, Any]] = {
    "no predictor (x^ alone)": {"gains": False},
    "gains, key groups of 16": {"gains": True, "key_group_size": 16},
    "gains, one key group a group": {"standardized_keys": False},
    "gains, one key group a group, standardized keys": {},
}


def converted(model: nn.Module, bn_to: str, head: dict[str, Any], *, forget: bool) -> nn.Module:
    """A conversion with a head; ``forget`` leaves out the start from running statistics."""
    options = {k: v for k, v in head.items() if k != "standardized_keys"}
    plan = ilmconvert.inspect(model, bn_to=bn_to, **options).plan
    if "standardized_keys" in head:
        plan = _without_standardized_keys(plan)
    no_statistics = mock.patch("ilmconvert.norms.batch._statistics", return_value=None)
    with no_statistics if forget else contextlib.nullcontext():
        return ilmconvert.apply_plan(model, plan).model


def _without_standardized_keys(plan: Plan) -> Plan:
    return replace(
        plan,
        decisions=tuple(
            replace(d, target=replace(d.target, standardized_keys=False)) if d.target else d for d in plan.decisions
        ),
    )


def measure(model: nn.Module, student: nn.Module, images: Tensor, test: Tensor, ridge: float = RIDGE) -> dict[str, Any]:
    calibrated = ilmconvert.calibrate(model, student, images.split(32), ridge=ridge, held_out=[test[:8]]).model
    return agreement(model, calibrated, test)


def main() -> None:
    model = lite0()
    photos = photographs()
    images = crops(photos[:5], 52, model.pretrained_cfg)
    images = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))][:256]
    test = crops(photos[5:], 64, model.pretrained_cfg, seed=1)
    rows: list[dict[str, Any]] = []

    def row(bn_to: str, start: str, count: int, student: nn.Module, ridge: float = RIDGE) -> None:
        figures = measure(model, student, images[:count], test, ridge) if count else agreement(model, student, test)
        rows.append({"bn_to": bn_to, "head and start": start, "images": count, "ridge": ridge, **figures})
        print(rows[-1], flush=True)

    for bn_to in ("layer", "group"):
        silent = converted(model, bn_to, {"gains": False}, forget=False)
        row(bn_to, "scale and shift copied", 0, copied(model, silent))
        row(bn_to, "running statistics (default, no data)", 0, converted(model, bn_to, {}, forget=False))
        for count in (32, 96, 256):
            for name, head in HEADS.items():
                row(bn_to, name, count, converted(model, bn_to, head, forget=True))
            row(bn_to, "running statistics (default)", count, converted(model, bn_to, {}, forget=False))
    for ridge in (0.0, 1e-4, 1e-2):
        for count in (32, 256):
            row("layer", list(HEADS)[-1], count, converted(model, "layer", {}, forget=True), ridge)
    write("calibration", rows, model="tf_efficientnet_lite0, ImageNet weights", held_out=len(test), size=128)


if __name__ == "__main__":
    main()
