"""Calibrate a conversion with a folder of images, as the options say; in one process or under torchrun."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ilmconvert.errors import UsageError
from ilmconvert.jsonable import to_json

if TYPE_CHECKING:
    from torch import nn

    from ilmconvert import Conversion
    from ilmconvert.calibration import CalibrationReport
    from ilmconvert.options import Progress

__all__ = ["Calibrated", "calibrate_conversion"]

RECORD = "calibration.json"


class Calibrated(NamedTuple):
    """A calibrated conversion, the account, and the images that could not be read."""

    conversion: Conversion
    report: CalibrationReport
    broken: dict[Path, str]

    def to_dict(self) -> dict[str, Any]:
        """The account as plain data."""
        return {"broken": {str(file): reason for file, reason in self.broken.items()}, **self.report.to_dict()}

    def records(self) -> dict[str, bytes]:
        """The account as a file to save beside the weights."""
        return {RECORD: (to_json(self.to_dict()) + "\n").encode()}


def calibrate_conversion(
    conversion: Conversion,
    original: nn.Module,
    images: Path,
    *,
    limit: int = 256,
    held_out: float = 0.2,
    held_out_images: Path | None = None,
    batch_size: int = 32,
    memory: float = 2.0,
    seed: int = 0,
    input_size: tuple[int, ...] | None = None,
    progress: Progress | None = None,
) -> Calibrated:
    """Calibrate with the images of this process; all processes get the same result.

    Args:
        conversion: what to calibrate.
        original: the model before the conversion.
        images: a folder.
        limit: images to fit to, of all processes.
        held_out: the share of further images to compare on.
        held_out_images: compare on these instead.
        batch_size, seed, input_size: of the images.
        memory: GiB of activations to hold.
        progress: called with (what, done, total).
    """
    from ilmconvert import calibrate
    from ilmconvert.images import image_batches
    from ilmconvert.processes import from_all, process_group

    further = 0 if held_out_images else max(round(limit * held_out / (1 - held_out)), 1)
    size = {"batch_size": batch_size, "input_size": input_size}
    batches = image_batches(images, original, limit=limit + further, seed=seed, **size)  # type: ignore[arg-type]
    if held_out_images:
        unseen = image_batches(held_out_images, original, seed=seed, **size)  # type: ignore[arg-type]
    else:
        batches, unseen = batches.split(held_out)
    with process_group() as (rank, world_size):
        if len(batches.files) < world_size:
            raise UsageError(f"expected an image for each of {world_size} processes, got {len(batches.files)}")
        batches, unseen = batches.share(rank, world_size), unseen.share(rank, world_size)
        result = calibrate(
            original, conversion.model, batches, held_out=unseen, memory=int(memory * 2**30), progress=progress
        )
        broken = from_all({**batches.broken, **unseen.broken})
    return Calibrated(replace(conversion, model=result.model), result.report, broken)
