from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from ilmconvert.errors import UsageError
from ilmconvert.images import image_batches, read_image


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five images of several modes in nested folders, two broken files and a text."""
    random = np.random.default_rng(0)
    for i, mode in enumerate(("RGB", "L", "RGBA", "P", "CMYK")):
        place = tmp_path / f"class{i % 2}" / "deep"
        place.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(random.integers(0, 255, (50 + i, 40, 3), dtype=np.uint8)).convert(mode)
        image.save(place / f"{i}.{'jpg' if mode == 'CMYK' else 'PNG'}")
    (tmp_path / "empty.png").touch()
    whole = (tmp_path / "class0" / "deep" / "0.PNG").read_bytes()
    (tmp_path / "truncated.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "readme.txt").write_text("not an image")
    return tmp_path


def test_reads_with_timms_transform_and_reports_broken_files(folder: Path) -> None:
    model = timm.create_model("test_resnet")
    batches = image_batches(folder, model, batch_size=2)
    first, second = list(batches), list(batches)
    assert [len(b) for b in first] == [2, 2, 1]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert {p.name for p in batches.broken} == {"empty.png", "truncated.png"}
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    readable = [file for file in batches.files if file not in batches.broken]
    assert torch.equal(torch.cat(first), torch.stack([transform(read_image(file)) for file in readable]))


def test_order_limit_split_and_share(folder: Path) -> None:
    model = timm.create_model("test_resnet")
    batches = image_batches(folder, model)
    assert batches.files == image_batches(folder, model).files != image_batches(folder, model, seed=1).files
    assert image_batches(folder, model, limit=3).files == batches.files[:3]
    train, held_out = batches.split(0.3)
    assert train.files + held_out.files == batches.files
    assert len(held_out.files) == 2
    assert [len(part.files) for part in batches.split(0.99)] == [1, len(batches.files) - 1]
    assert [len(part.files) for part in batches.split(0.01)] == [len(batches.files) - 1, 1]
    shares = [batches.share(rank, 3).files for rank in range(3)]
    assert sorted(sum(shares, ())) == sorted(batches.files)
    assert max(map(len, shares)) - min(map(len, shares)) == 1
    (one,) = image_batches(folder, model, limit=1, input_size=(3, 64, 64))
    assert one.shape == (1, 3, 64, 64)


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("order", ["<", ">"])
def test_16_bits_are_scaled_to_8(suffix: str, order: str, tmp_path: Path) -> None:
    values = np.array([[0, 100, 8000, 40000, 65535]], f"{order}u2")
    Image.fromarray(values).save(tmp_path / f"deep.{suffix}")
    read = np.asarray(read_image(tmp_path / f"deep.{suffix}"))
    assert read.tolist() == [[[gray] * 3 for gray in (0, 0, 31, 156, 255)]]


def test_values_without_a_known_range_are_left_out(folder: Path) -> None:
    for name, kind in (("integers.png", np.int32), ("floats.png", np.float32)):
        Image.fromarray(np.full((40, 40), 8000, kind)).save(folder / name, "TIFF")
    batches = image_batches(folder, timm.create_model("test_resnet"))
    assert sum(map(len, batches)) == 5
    told = "expected 8 or 16 bits a value, got 32, whose range is not known (PIL mode {})"
    assert batches.broken[folder / "integers.png"] == told.format("I")
    assert batches.broken[folder / "floats.png"] == told.format("F")


def test_a_huge_image_is_left_out(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    huge = folder / "huge.png"
    Image.new("L", (400, 300)).save(huge)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50000)
    batches = image_batches(folder, timm.create_model("test_resnet"))
    assert sum(map(len, batches)) == 5
    assert "(120000 pixels) exceeds limit of 100000 pixels" in batches.broken[huge]


def test_nothing_but_broken_files_is_an_error(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_text("no image")
    with pytest.raises(UsageError, match=r"none of 2 files can; the first is .*png': cannot identify image file"):
        list(image_batches(tmp_path, timm.create_model("test_resnet")))


def test_one_clear_error(folder: Path, tmp_path: Path) -> None:
    model = timm.create_model("test_resnet")
    (tmp_path / "none").mkdir()
    for wrong, words in (("absent", "found none"), ("readme.txt", "found a file"), ("none", "expected images")):
        with pytest.raises(UsageError, match=words):
            image_batches(tmp_path / wrong, model)
    with pytest.raises(UsageError, match="batch_size to be at least 1, got 0"):
        image_batches(folder, model, batch_size=0)
    with pytest.raises(UsageError, match="at least 2 images"):
        image_batches(folder, model, limit=1).split(0.5)
