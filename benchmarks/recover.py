"""How much of a converted network comes back when it is trained to answer as its original, without labels.

EfficientNet-Lite0 with ImageNet weights; crops of five photographs to train on. Measured on other crops of the same
photographs, of which some choose the best candidate and some do not, and on crops of three other photographs.

Run: ``python -m benchmarks.recover [FOLDER]`` (needs ``pip install -e '.[bench,train]'``). FOLDER is a saved conversion
to start from, a calibrated one for instance; without it, the bare conversion. ``--paper`` starts from the paper's own
predictor (16 channels to a key group, no gains), which cannot hold what Batch Norm computes.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.transforms.v2.functional import to_pil_image

import ilmconvert
from benchmarks.common import agreement, crops, lite0, photographs, write
from ilmconvert.training.groups import META_LR_SCALE

SIZE = 128
OTHERS = 3  # photographs that are measured on only


def files(images: list[Tensor], folder: Path) -> Path:
    """The photographs as files, each several times so that an epoch is more than a few steps."""
    for number, image in enumerate(images):
        for copy in range(32):
            to_pil_image(image).save(folder / f"{number}-{copy}.png")
    return folder


def start(given: argparse.Namespace, model: nn.Module) -> nn.Module:
    """The converted model to start from."""
    if given.folder is not None:
        return ilmconvert.load(given.folder, model=model)
    paper = {"key_group_size": 16, "reduction": 16, "gains": False} if given.paper else {}
    return ilmconvert.convert(model, bn_to=given.bn_to, **paper).model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--minutes", type=float, default=15.0)
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--batch-size", type=int, default=24)
    parser.add_argument("--augment", type=float, default=0.5)
    parser.add_argument("--features", type=float, default=0.0)
    parser.add_argument("--meta-lr-scale", type=float, default=META_LR_SCALE)
    parser.add_argument("--freeze", action="store_true")
    parser.add_argument("--bn-to", choices=["layer", "group", "instance"], default="layer")
    parser.add_argument("--paper", action="store_true")
    parser.add_argument("--name", default="recover")
    given = parser.parse_args()

    model = lite0()
    converted = start(given, model)
    pictures = photographs()
    same, other = pictures[:-OTHERS], pictures[-OTHERS:]
    held_out, again, elsewhere = (
        crops(images, 240 // len(images), model.pretrained_cfg, size=SIZE, seed=seed)
        for images, seed in ((same, 1), (same, 2), (other, 2))
    )
    measured = {
        "held out": held_out,
        "further crops of the photographs trained on": again,
        "crops of other photographs": elsewhere,
    }
    with tempfile.TemporaryDirectory() as folder:
        recovery = ilmconvert.recover(
            model,
            converted,
            files(same, Path(folder)),
            held_out_images=held_out,
            minutes=given.minutes,
            lr=given.lr,
            batch_size=given.batch_size,
            augment=given.augment,
            features=given.features,
            meta_lr_scale=given.meta_lr_scale,
            freeze=given.freeze,
            input_size=(3, SIZE, SIZE),
            evaluate_every=25,
        )
    rows = [
        {"when": when, "images": images, **agreement(model, net.eval(), x)}
        for images, x in measured.items()
        for when, net in (("start", converted), ("recovered", recovery.model))
    ]
    along = [
        {"step": e.step, "seconds": round(e.seconds), "agreement %": 100 * e.top1} for e in recovery.report.evaluations
    ]
    begun = {name: str(getattr(given, name)) for name in ("folder", "bn_to", "paper")}
    options = {name: value for name, value in recovery.report.options.items() if value is not None}
    write(
        given.name,
        rows,
        model="tf_efficientnet_lite0, ImageNet weights",
        size=SIZE,
        options=options,
        along=along,
        start=begun,
    )
    print(recovery.report)


if __name__ == "__main__":
    torch.set_num_threads(2)
    main()
