"""Accuracy on handwritten digits: conversion, calibration, fine-tuning at batch size 2, recovery, and from scratch.

Run: ``python -m benchmarks.digits [convert|shift|recover|scratch]`` (needs ``pip install -e '.[bench]'``, and ``train``
for ``recover``). The network is a small residual one with nine Batch Norms; five seeds, mean and standard deviation in
percent.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ilmconvert
from benchmarks.common import run_parts, write

SEEDS = range(5)
Data = tuple[Tensor, Tensor]


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return (y + self.shortcut(x)).relu()


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    stem = (nn.Conv2d(1, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
    blocks = (Block(16, 16, 1), Block(16, 32, 2), Block(32, 64, 2))
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def group_norm(model: nn.Module) -> nn.Module:
    """What people do by hand: GroupNorm with the Batch Norm's scale and shift."""
    result = copy.deepcopy(model)
    for path, norm in model.named_modules():
        if isinstance(norm, nn.BatchNorm2d):
            group = nn.GroupNorm(8, norm.num_features)
            group.load_state_dict({"weight": norm.weight, "bias": norm.bias})
            result.set_submodule(path, group)
    return result


class Frozen(nn.BatchNorm2d):
    """Batch Norm that keeps its running statistics while it is trained, as detectors use it."""


def frozen(model: nn.Module) -> nn.Module:
    result = copy.deepcopy(model)
    for module in result.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.__class__ = Frozen
    return result


def digits(seed: int) -> tuple[Data, Data]:
    """Training and test images ``(N, 1, 16, 16)`` with their labels."""
    from sklearn.datasets import load_digits

    data = load_digits()
    x = F.interpolate(torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1, (16, 16), mode="bilinear")
    y = torch.tensor(data.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    train, test = order[:1400], order[1400:]
    return (x[train], y[train]), (x[test], y[test])


def shifted(data: Data, seed: int) -> Data:
    """Inverted, turned by up to 60 degrees, and noisy."""
    from torchvision.transforms.functional import rotate

    generator = torch.Generator().manual_seed(seed)
    x = torch.stack([rotate(-i, float(torch.rand((), generator=generator) * 120 - 60)) for i in data[0]])
    return x + 0.5 * torch.randn(x.shape, generator=generator), data[1]


def train(model: nn.Module, data: Data, *, batch_size: int, epochs: int, lr: float, seed: int) -> nn.Module:
    x, y = data
    generator = torch.Generator().manual_seed(seed)
    steps = epochs * (len(x) // batch_size)
    optimizer = torch.optim.SGD(ilmconvert.parameter_groups(model, lr=lr, weight_decay=5e-4), lr=lr, momentum=0.9)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [group["lr"] for group in optimizer.param_groups], total_steps=steps
    )
    model.train()
    for module in model.modules():
        if isinstance(module, Frozen):
            module.eval()
    for _ in range(epochs):
        for batch in torch.randperm(len(x), generator=generator)[: len(x) // batch_size * batch_size].split(batch_size):
            optimizer.zero_grad()
            F.cross_entropy(model(x[batch]), y[batch]).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
            schedule.step()
    return model


def trained(seed: int) -> tuple[Data, Data, nn.Module]:
    """Training data, test data, and the network with Batch Norm trained on the first."""
    data, test = digits(seed)
    return data, test, train(network(seed), data, batch_size=32, epochs=12, lr=0.1, seed=seed).eval()


@torch.no_grad()
def accuracy(model: nn.Module, data: Data) -> float:
    return 100 * (model.eval()(data[0]).argmax(1) == data[1]).float().mean().item()


def spread(values: Iterable[float]) -> str:
    found = list(values)
    return f"{statistics.mean(found):.2f} +- {statistics.stdev(found):.2f}"


def table(name: str, figures: dict[str, dict[str, list[float]]], **more: Any) -> None:
    write(name, [{"model": m, **{k: spread(v) for k, v in row.items()}} for m, row in figures.items()], **more)


CONVERSIONS: dict[str, dict[str, Any]] = {
    "ILM layer": {},
    "ILM group (8)": {"bn_to": "group", "num_groups": 8},
    "ILM group (8), silent predictor": {"bn_to": "group", "num_groups": 8, "gains": False},
}

PAPER = "ILM group (8), mode paper"
MODE_PAPER: dict[str, Any] = {"bn_to": "group", "num_groups": 8, "mode": "paper"}


def starts(model: nn.Module, images: Tensor) -> dict[str, tuple[nn.Module, nn.Module]]:
    """(straight after conversion, calibrated with the images) by name."""
    result = {
        "BatchNorm, the original": (model, model),
        "BatchNorm, statistics frozen": (frozen(model),) * 2,
        "GroupNorm (8), scale and shift copied": (group_norm(model),) * 2,
    }
    for name, options in CONVERSIONS.items():
        converted = ilmconvert.convert(model, example_inputs=images, **options).model
        result[name] = (converted, ilmconvert.calibrate(model, converted, images.split(32)).model)
    return result


def convert() -> None:
    """Before, after conversion, after calibration with 64 images, after an epoch at batch size 2."""
    figures: dict[str, dict[str, list[float]]] = {}
    for seed in SEEDS:
        data, test, model = trained(seed)
        for name, (converted, calibrated) in starts(model, data[0][:64]).items():
            row = figures.setdefault(name, {"original": [], "converted": [], "calibrated": [], "epoch at batch 2": []})
            tuned = train(copy.deepcopy(calibrated), data, batch_size=2, epochs=1, lr=0.01, seed=seed)
            for key, value in zip(row, (model, converted, calibrated, tuned), strict=True):
                row[key].append(accuracy(value, test))
        print({name: {k: v[-1] for k, v in row.items()} for name, row in figures.items()}, flush=True)
    table("digits_convert", figures, seeds=len(SEEDS), calibration_images=64)


def shift() -> None:
    """Fine-tuning to a shifted domain with 100 and 300 labels at batch size 2."""
    figures: dict[str, dict[str, list[float]]] = {}
    for seed in SEEDS:
        data, test, model = trained(seed)
        few, unseen = shifted((data[0][:300], data[1][:300]), seed), shifted(test, seed + 100)
        for name, (_, calibrated) in starts(model, data[0][:64]).items():
            row = figures.setdefault(name, {"before": [], "100 labels": [], "300 labels": []})
            row["before"].append(accuracy(calibrated, unseen))
            for count, key in ((100, "100 labels"), (300, "300 labels")):
                some = (few[0][:count], few[1][:count])
                tuned = train(copy.deepcopy(calibrated), some, batch_size=2, epochs=6, lr=0.01, seed=seed)
                row[key].append(accuracy(tuned, unseen))
        print({name: {k: v[-1] for k, v in row.items()} for name, row in figures.items()}, flush=True)
    table("digits_shift", figures, seeds=len(SEEDS), shift="inverted, turned by up to 60 degrees, noise 0.5")


def recover() -> None:
    """Conversions that lose accuracy, trained without labels to answer as the original; at the default options."""
    silent = "ILM group (8), silent predictor"
    lossy = {silent: CONVERSIONS[silent], PAPER: MODE_PAPER}
    figures: dict[str, dict[str, list[float]]] = {}
    for seed in SEEDS:
        data, test, model = trained(seed)
        for name, options in lossy.items():
            converted = ilmconvert.convert(model, example_inputs=data[0][:2], **options).model
            recovery = ilmconvert.recover(model, converted, data[0], seed=seed)
            row = figures.setdefault(name, {"original": [], "converted": [], "recovered": []})
            for key, value in zip(row, (model, converted, recovery.model), strict=True):
                row[key].append(accuracy(value, test))
        print({name: {k: v[-1] for k, v in row.items()} for name, row in figures.items()}, flush=True)
    report = recovery.report
    table("digits_recover", figures, seeds=len(SEEDS), training_images=report.images, held_out=report.held_out)


def scratch() -> None:
    """Training from scratch at several batch sizes, on few and noisy images so that the task does not saturate."""

    def ilm(model: nn.Module) -> nn.Module:
        return ilmconvert.convert(model, example_inputs=torch.randn(2, 1, 16, 16), **MODE_PAPER).model

    kinds: dict[str, Callable[[nn.Module], nn.Module]] = {"BatchNorm": copy.deepcopy, "GroupNorm (8)": group_norm}
    kinds[PAPER] = ilm
    figures: dict[str, dict[str, list[float]]] = {name: {} for name in kinds}
    for seed in SEEDS:
        data, test = digits(seed)
        data, test = shifted((data[0][:700], data[1][:700]), seed), shifted(test, seed + 100)
        for batch_size in (2, 4, 8, 32):
            for name, make in kinds.items():
                model = make(network(seed))
                lr = 0.1 * batch_size / 32 if batch_size < 32 else 0.1
                train(model, data, batch_size=batch_size, epochs=6, lr=max(lr, 0.01), seed=seed)
                figures[name].setdefault(f"batch {batch_size}", []).append(accuracy(model, test))
        print({name: {k: v[-1] for k, v in row.items()} for name, row in figures.items()}, flush=True)
    table("digits_scratch", figures, seeds=len(SEEDS), training_images=700, epochs=6)


if __name__ == "__main__":
    run_parts({"convert": convert, "shift": shift, "recover": recover, "scratch": scratch})
