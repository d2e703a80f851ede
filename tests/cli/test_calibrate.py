"""``ilmconvert calibrate`` and ``convert --calibrate``: one process, several, and what can go wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from ilmconvert_cli.main import main
from PIL import Image
from safetensors.torch import load_file, save_file

import ilmconvert

SIZE = ["--input-size", "3,64,64"]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A network with running statistics that fit its images, converted with a silent head, and the images."""
    monkeypatch.chdir(tmp_path)
    for number in range(13):
        file = tmp_path / "images" / f"class{number % 2}" / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((80, 70), 8 * number + 4).convert("RGB").save(file)
    (tmp_path / "images" / "broken.jpg").write_bytes(b"not an image")
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=6).train()
    for _ in range(20):
        model(torch.randn(8, 3, 64, 64) * torch.rand(8, 1, 1, 1) + 0.3)
    save_file(model.state_dict(), "weights.safetensors")
    ilmconvert.convert(model.eval(), gains=True, key_group_size=16).save("ilm")
    return tmp_path


def test_calibrates_a_folder(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["calibrate", "ilm", "--images", "images", "-o", "out", *SIZE]) == 0
    printed = capsys.readouterr().out
    assert "15 layers fitted to 10 images" in printed
    assert "1 file could not be read:" in printed
    assert "images/broken.jpg: cannot identify image file" in printed
    assert "saved to out" in printed
    record = json.loads(Path("out/calibration.json").read_text())
    assert record["after"]["kl"] < 0.5 * record["before"]["kl"]
    assert len(record["sites"]) == 15
    conversion = ilmconvert.load_conversion("out")
    weights = load_file("weights.safetensors")
    assert all(torch.equal(v, weights[k]) for k, v in conversion.original().state_dict().items())

    assert main(["calibrate", "ilm", "--images", "images", *SIZE]) == 2
    assert "expected --output OUT, or --force to replace 'ilm' itself" in capsys.readouterr().err
    assert main(["calibrate", "ilm", "--images", "images", "--force", "--json", "--memory", "0", *SIZE]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["spilled"] > 0
    assert again["after"] == pytest.approx(record["after"], rel=1e-4, abs=1e-6)
    assert list(again["broken"]) == ["images/broken.jpg"]
    a, b = (load_file(f"{folder}/model.safetensors") for folder in ("out", "ilm"))
    assert all(torch.allclose(a[k], b[k], rtol=1e-4, atol=1e-5) for k in a)


@pytest.mark.parametrize(
    ("limit", "more", "unseen"), [(1, [], 1), (2, [], 1), (8, [], 2), (2, ["--held-out", "0.7"], 5)]
)
def test_the_limit_is_what_is_fitted_to(
    limit: int, more: list[str], unseen: int, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("images/broken.jpg").unlink()
    command = ["calibrate", "ilm", "--images", "images", "-o", "out", "--limit", str(limit), "--json", *more, *SIZE]
    assert main(command) == 0
    record = json.loads(capsys.readouterr().out)
    assert (record["images"], record["after"]["answers"]) == (limit, unseen)


def test_converts_and_calibrates_at_once(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["convert", "test_resnet", "--checkpoint", "weights.safetensors", "--model-arg", "num_classes=6"]
    assert main([*command, "--no-gains", "--calibrate", "images", "-o", "out", "--json", *SIZE]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["converted"] == len(result["calibration"]["sites"]) == 15
    assert result["calibration"]["after"]["kl"] < result["calibration"]["before"]["kl"]
    assert list(result["calibration"]["broken"]) == ["images/broken.jpg"]
    assert json.loads(Path("out/calibration.json").read_text()) == result["calibration"]
    assert main([*command, "--calibrate", "images", "-o", "default", *SIZE]) == 0
    assert "agreement 100.0 %" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["calibrate", "nothing", "--images", "images", "-o", "out"], 2, "expected a folder saved by ilmconvert"),
        (["calibrate", "ilm", "--images", "nothing", "-o", "out"], 2, "expected a folder of images at 'nothing'"),
        (["calibrate", "ilm", "--images", "images", "-o", "images"], 2, "expected a new folder"),
        (
            ["calibrate", "ilm", "--images", "images", "-o", "images/class0/out"],
            2,
            "outside of the images in 'images', got 'images/class0/out'",
        ),
        (
            ["calibrate", "ilm", "--images", "images/class0", "--held-out-images", "images", "-o", "images/o"],
            2,
            "outside of the images in 'images', got 'images/o'",
        ),
        (["convert", "test_resnet", "--calibrate", "images", "-o", "images/out"], 2, "outside of the images in"),
        (["calibrate", "ilm", "--images", "images", "-o", "out", "--held-out", "1"], 2, "--held-out"),
        (["calibrate", "ilm", "--images", "images", "-o", "out", "--held-out", "nan"], 2, "expected a finite number"),
        (["calibrate", "ilm", "--images", "images", "-o", "out", "--memory", "nan"], 2, "expected a finite number"),
        (["calibrate", "ilm", "--images", "images", "-o", "out", "--memory", "1e308"], 2, "0<=x<=1000000"),
        (["calibrate", "ilm", "--images", "images", "-o", "out", "--input-size", "1,32,32"], 2, "(3, H, W) for images"),
        (
            ["calibrate", "ilm", "--images", "images", "-o", "out", "--held-out", "0.2", "--held-out-images", "images"],
            2,
            "expected --held-out or --held-out-images, got both",
        ),
        (
            ["convert", "test_vit", "--calibrate", "images", "-o", "out"],
            2,
            "layers that replaced other norms are exact",
        ),
    ],
)
def test_one_clear_error(
    arguments: list[str], code: int, words: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == code
    assert words in " ".join(capsys.readouterr().err.split())
    assert not Path("out").exists()


@pytest.mark.slow
def test_two_processes_give_what_one_gives(place: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    for count in ("1", "2"):
        command = [*torchrun, count, "-m", "ilmconvert", "calibrate", "ilm", "--images", "images", "-o", count, *SIZE]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        assert result.returncode == 0, result.stderr
        assert result.stdout.count("saved to") == 1
    one, two = (load_file(f"{count}/model.safetensors") for count in ("1", "2"))
    assert all(torch.allclose(one[k], two[k], rtol=1e-4, atol=1e-4 * one[k].abs().max()) for k in one)
    reports = [json.loads(Path(count, "calibration.json").read_text()) for count in ("1", "2")]
    assert reports[0]["images"] == reports[1]["images"] == 10
    assert reports[0]["after"] == pytest.approx(reports[1]["after"], rel=1e-4, abs=1e-6)
