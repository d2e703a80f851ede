"""The stream of training images: what comes when does not depend on breaks, processes or workers."""

from __future__ import annotations

import random
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from ilmconvert.errors import UsageError
from ilmconvert.images import image_batches, read_image
from ilmconvert.training.data import open_images
from ilmconvert.training.options import RecoverOptions
from ilmconvert.training.stream import _Stream, held_out_loader, training_stream


class Numbers(Dataset[Tensor]):
    """Items that tell their index and what the three random generators gave."""

    def __len__(self) -> int:
        return 7

    def __getitem__(self, index: int) -> Tensor:
        return torch.tensor([index, random.random(), np.random.rand(), float(torch.rand(()))], dtype=torch.float64)


def take(steps: int, *, start: int = 0, rank: int = 0, world_size: int = 1, workers: int = 0) -> list[Tensor]:
    options = RecoverOptions(batch_size=4, seed=5, workers=workers)
    stream = training_stream(Numbers(), options, start, rank, world_size)
    return [next(stream).images for _ in range(steps)]


def test_breaks_processes_and_workers_change_nothing() -> None:
    whole = take(6)
    assert all(map(torch.equal, take(3, start=3), whole[3:]))
    assert all(map(torch.equal, take(6, workers=1), whole))
    parts = zip(take(6, rank=0, world_size=2), take(6, rank=1, world_size=2), strict=True)
    for step, (a, b) in zip(whole, parts, strict=True):
        assert torch.equal(torch.stack((a, b), 1).flatten(0, 1), step)


def test_every_pass_over_the_held_out_images_is_the_same() -> None:
    def measured_on(rank: int = 0, world_size: int = 1) -> list[Tensor]:
        loader = held_out_loader(Numbers(), RecoverOptions(batch_size=2 * world_size, seed=5), rank, world_size)
        first, second = (torch.cat([batch.images for batch in loader]) for _ in range(2))
        assert torch.equal(first, second)
        return first

    state, whole = torch.get_rng_state(), measured_on()
    assert torch.equal(torch.get_rng_state(), state)
    assert len(whole[:, 1:].unique(dim=0)) == 7
    assert torch.equal(measured_on(1, 2), whole[1::2])


def test_each_epoch_has_every_image_once_in_another_order() -> None:
    order = torch.cat(take(7))[:, 0].reshape(4, 7)
    assert all(sorted(epoch) == list(range(7)) for epoch in order.tolist())
    assert not torch.equal(order[0], order[1])
    draws = torch.cat(take(7))[:, 1:]
    assert len(draws.unique(dim=0)) == 28  # and every draw is a new one


def test_batches_must_be_shared_evenly() -> None:
    with pytest.raises(UsageError, match="3 processes can share evenly, got 4"):
        take(1, world_size=3)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("2/a", "2/b", "10/a", "10/deep/10/b", "10/c"):
        file = tmp_path / f"{name}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((40, 48), 100).convert("RGB").save(file)
    return tmp_path


def test_folders_are_split_by_file_and_labelled_by_folder(folder: Path) -> None:
    model = timm.create_model("test_resnet")
    options = RecoverOptions(held_out=0.4, batch_size=3, input_size=(3, 32, 32))
    data = open_images(folder, model, options, labels=True)
    assert data.classes == ("2", "10")
    assert (len(data.train), len(data.held_out)) == (3, 2)
    assert not set(data.train.files) & set(data.held_out.files)
    labels = {f: t for part in (data.train, data.held_out) for f, t in zip(part.files, part.targets, strict=True)}
    assert {file.relative_to(folder).parts[0]: label for file, label in labels.items()} == {"2": 0, "10": 1}
    again = open_images(folder, model, options, labels=True)
    assert again.digest == data.digest
    assert open_images(folder, model, RecoverOptions(seed=1), labels=True).digest != data.digest
    (batch,) = held_out_loader(data.held_out, options, 0, 1)
    assert batch.images.shape == (2, 3, 32, 32)
    assert batch.labels.tolist() == list(data.held_out.targets)


@pytest.mark.parametrize(
    ("count", "share", "held"), [(20, 0.25, 5), (20, 0.01, 1), (2, 0.99, 1), (3000, 0.5, 1500), (30_000, 0.1, 2048)]
)
def test_no_image_is_both_trained_and_measured_on(count: int, share: float, held: int) -> None:
    images = torch.arange(count).view(count, 1, 1, 1)
    data = open_images(images, torch.nn.Identity(), RecoverOptions(held_out=share), labels=False)
    assert (len(data.train), len(data.held_out)) == (count - held, held)
    numbers = [int(part[i][0]) for part in (data.train, data.held_out) for i in range(len(part))]
    assert sorted(numbers) == list(range(count))


def test_strength_of_augmentation(folder: Path) -> None:
    model = timm.create_model("test_resnet")

    def two_draws(strength: float) -> tuple[Tensor, Tensor]:
        options = RecoverOptions(batch_size=4, augment=strength, input_size=(3, 32, 32))
        data = open_images(folder, model, options, labels=False)
        assert torch.equal(data.held_out[0], data.held_out[0])  # which are measured on, and stay as they are
        stream = training_stream(data.train, options, 0, 0, 1)
        return next(stream).images.sort(0).values, next(stream).images.sort(0).values

    assert torch.equal(*two_draws(0.0))
    assert not torch.equal(*two_draws(0.5))
    a, b = two_draws(1.0)
    assert a.shape == b.shape == (4, 3, 32, 32)


def test_batches_are_trained_on_with_their_own_transform(folder: Path) -> None:
    model = timm.create_model("test_resnet")
    sized = image_batches(folder, model, input_size=(3, 64, 64))
    custom = replace(sized, transform=lambda image: torch.full((3, 8, 8), float(image.width)))
    for given, shape in ((sized, (3, 64, 64)), (custom, (3, 8, 8))):
        data = open_images(given, model, RecoverOptions(), labels=False)
        for part in (data.train, data.held_out):
            assert part[0].shape == shape
            assert torch.equal(part[0], given.transform(read_image(part.files[0])))


def test_broken_files_are_told_and_replaced(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken, huge = folder / "2" / "broken.png", folder / "2" / "huge.png"
    Image.new("L", (200, 100)).save(huge)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5000)
    broken.write_bytes(b"nothing")
    options = RecoverOptions(batch_size=6, held_out=0.01, input_size=(3, 32, 32))
    data = open_images(folder, timm.create_model("test_resnet"), options, labels=False)
    told: dict[str, str] = {}
    for part in (training_stream(data.train, options, 0, 0, 1), iter(held_out_loader(data.held_out, options, 0, 1))):
        batch = next(part)
        told |= batch.broken
        assert batch.images is None or torch.isfinite(batch.images).all()
    assert told.keys() == {str(broken), str(huge)}
    assert "cannot identify" in told[str(broken)]
    assert "exceeds limit of 10000 pixels" in told[str(huge)]


def test_the_first_of_nothing_but_broken_files_is_told(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.png").write_bytes(b"nothing")
    options = RecoverOptions(batch_size=1)
    data = open_images(tmp_path, timm.create_model("test_resnet"), options, labels=False)
    index, _ = next(iter(_Stream(len(data.train), 1, options.seed, 0, 0, 1)))[0]
    first = str(data.train.files[index])
    message = f"none of 2 can; the first is {first!r}: cannot identify image file {first!r}"
    with pytest.raises(UsageError, match=f"^expected images that can be read, but {re.escape(message)}$"):
        next(training_stream(data.train, options, 0, 0, 1))


def test_images_beside_the_classes_are_refused(folder: Path) -> None:
    (folder / "2" / "a.png").rename(folder / "a.png")
    with pytest.raises(UsageError, match="a folder for each class"):
        open_images(folder, timm.create_model("test_resnet"), RecoverOptions(), labels=True)
