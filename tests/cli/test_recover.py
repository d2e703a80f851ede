"""``ilmconvert recover`` as a user meets it, killed and gone on with too."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
from ilmconvert_cli.main import main
from PIL import Image

import ilmconvert
from tests.helpers import full_disk, same_state

Output = pytest.CaptureFixture[str]
QUICK = ["--input-size", "3,32,32", "--batch-size", "4", "--lr", "1e-3"]


@pytest.fixture(autouse=True)
def _in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for number in range(16):
        file = Path("images") / f"class{number % 3}" / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((40, 40), 10 * number).convert("RGB").save(file)


def convert(output: str = "ilm") -> None:
    assert main(["convert", "test_resnet", "--model-arg", "num_classes=6", "-o", output]) == 0


def test_recover_and_what_is_left_behind(capsys: Output) -> None:
    convert()
    capsys.readouterr()
    arguments = ["recover", "ilm", "--images", "images", "-o", "out", *QUICK]
    assert main([*arguments, "--steps", "4", "--evaluate-every", "2"]) == 0
    printed = capsys.readouterr().out
    assert "training loss   agreement        kl" in printed
    assert "agreement on 2 held-out images: " in printed
    assert "ilmconvert verify out" in printed
    assert {p.name for p in Path("out").glob("recover.*")} == {f"recover.{s}" for s in ("csv", "json", "jsonl", "png")}
    assert [json.loads(line)["step"] for line in Path("out/recover.jsonl").read_text().splitlines()] == [0, 2, 4]
    assert sorted(p.name for p in Path().iterdir()) == ["ilm", "images", "out"]
    assert main(["verify", "out"]) == 0

    assert main([*arguments, "--steps", "1"]) == 2  # nothing is overwritten unasked
    capsys.readouterr()
    assert main([*arguments, "--steps", "1", "--force", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["output"], result["options"]["steps"], result["images"]) == ("out", 1, 14)
    assert result["best"]["agreement"] >= result["start"]["agreement"]


@pytest.mark.parametrize(
    ("output", "message"),
    [("ilm", "expected a new folder"), ("images/out", "outside of the images in 'images', got 'images/out', whose")],
)
def test_a_wrong_output_is_told_before_any_work(output: str, message: str, capsys: Output) -> None:
    convert()
    capsys.readouterr()
    assert main(["recover", "ilm", "--images", "images", "-o", output, "--steps", "1", *QUICK]) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.out == ""
    assert not Path(f"{output}.run").exists()


def test_a_trained_folder_needs_its_teacher(capsys: Output) -> None:
    convert()
    arguments = ["--images", "images", "--steps", "2", *QUICK]
    conversion = ilmconvert.load_conversion("ilm")
    conversion.model.fc.weight.data += 0.01
    conversion.save("trained")
    capsys.readouterr()
    assert main(["recover", "trained", "-o", "out", *arguments]) == 1
    assert "--teacher" in capsys.readouterr().err
    assert not Path("out").exists()
    assert main(["recover", "trained", "-o", "out", "--teacher", "trained", *arguments]) == 1
    assert main(["recover", "trained", "-o", "out", "--teacher", "ilm", *arguments]) == 0
    assert main(["recover", "trained", "-o", "b", "--teacher-checkpoint", "x", *arguments]) == 2
    assert main(["recover", "ilm", "-o", "b", "--held-out", "0.1", "--held-out-images", "images", *arguments]) == 2
    assert main(["recover", "ilm", "-o", "frozen", "--freeze", *arguments]) == 0
    assert same_state(ilmconvert.load_conversion("frozen").original(), ilmconvert.load_conversion("ilm").revert())
    assert main(["recover", "frozen", "-o", "more", *arguments]) == 0  # its original can be had from it


def test_labels_with_a_new_head(capsys: Output) -> None:
    convert()
    arguments = ["recover", "ilm", "--images", "images", "--labels", "-o", "out", "--steps", "2", *QUICK]
    capsys.readouterr()
    assert main(arguments) == 2
    assert "each of the model's 6 classes, found 3" in capsys.readouterr().err
    assert main([*arguments, "--force", "--reset-classifier", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["best"]["accuracy"] >= result["start"]["accuracy"]
    assert ilmconvert.load("out").num_classes == 3


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--teacher", "ilm"], "expected --labels or --teacher, got both"),
        (["--teacher-checkpoint", "weights.pth"], "expected --labels or --teacher-checkpoint, got both"),
        (["--temperature", "2"], "expected temperature=1 with labels"),
    ],
)
def test_labels_leave_nothing_for_a_teacher(option: list[str], message: str, capsys: Output) -> None:
    convert()
    assert main(["recover", "ilm", "--images", "images", "--labels", "-o", "out", *QUICK, *option]) == 2
    assert message in capsys.readouterr().err
    assert not Path("out").exists()


@pytest.mark.slow
def test_a_killed_run_goes_on_as_if_nothing_had_happened(capsys: Output) -> None:
    convert()
    arguments = ["recover", "ilm", "--images", "images", "--steps", "12", "--evaluate-every", "3", *QUICK]
    command = [sys.executable, "-m", "ilmconvert", *arguments]
    subprocess.run([*command, "-o", "whole"], check=True, capture_output=True)
    process = subprocess.Popen([*command, "-o", "broken"], stdout=subprocess.DEVNULL)
    log = Path("broken.run/recover.jsonl")
    while not (log.is_file() and len(log.read_text().splitlines()) >= 3):
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not Path("broken").exists()
    assert main([*arguments, "-o", "broken"]) == 2
    assert "go on with --resume" in capsys.readouterr().err
    assert main([*arguments, "-o", "broken", "--resume", "--lr", "1"]) == 1
    assert "differs in lr" in capsys.readouterr().err
    subprocess.run([*command, "-o", "broken", "--resume"], check=True, capture_output=True)
    assert Path("broken/model.safetensors").read_bytes() == Path("whole/model.safetensors").read_bytes()
    logs = [Path(name, "recover.jsonl").read_text().splitlines() for name in ("whole", "broken")]
    a, b = ([{**json.loads(line), "seconds": 0} for line in lines] for lines in logs)
    assert a == b
    assert not Path("broken.run").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("ended_by", "code"), [(signal.SIGINT, 1), (signal.SIGTERM, 143)])
def test_a_run_belongs_to_one_process(
    ended_by: signal.Signals,
    code: int,
    capsys: Output,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    temporary = tmp_path_factory.mktemp("temporary")
    monkeypatch.setenv("TMPDIR", str(temporary))
    monkeypatch.setattr("tempfile.tempdir", None)  # looked up anew
    convert()
    arguments = ["recover", "ilm", "--images", "images", *QUICK, "-o", "out"]
    command = [sys.executable, "-m", "ilmconvert", *arguments, "--steps", "100000", "--evaluate-every", "2"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # what runs in the background ignores it
    )
    while not Path("out.run/checkpoint.safetensors").exists():
        assert process.poll() is None
        time.sleep(0.01)
    assert main([*arguments, "--steps", "100000", "--evaluate-every", "2", "--resume"]) == 2
    assert "another process works on it" in capsys.readouterr().err
    process.send_signal(ended_by)
    _, err = process.communicate(timeout=120)
    assert process.returncode == code
    assert "it goes on with --resume" in err
    assert not list(temporary.glob("*.lock"))


def test_a_run_that_diverged_is_told_in_strict_json(capsys: Output) -> None:
    def refuse(constant: str) -> None:
        raise ValueError(constant)

    convert()
    capsys.readouterr()
    options = ["--lr", "1e30", "--clip", "0", "--warmup", "0", "--steps", "4", "--evaluate-every", "2", "--json"]
    size = ["--input-size", "3,32,32", "--batch-size", "4"]
    assert main(["recover", "ilm", "--images", "images", "-o", "out", *size, *options]) == 0
    result = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert result["stopped"] == "diverged"
    assert result["last"]["loss"] is None
    for line in Path("out/recover.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=refuse)


def test_a_foreign_folder_in_the_place_of_the_run_is_left_alone(capsys: Output) -> None:
    convert()
    Path("out.run").mkdir()
    Path("out.run/thesis.txt").write_text("years of work")
    arguments = ["recover", "ilm", "--images", "images", "-o", "out", "--steps", "1", *QUICK]
    for more in (["--force"], ["--resume"]):
        assert main([*arguments, *more]) == 2
        assert "there is something else: thesis.txt" in capsys.readouterr().err
    assert Path("out.run/thesis.txt").read_text() == "years of work"


def test_a_run_that_the_disk_refused_is_none(capsys: Output) -> None:
    convert()
    capsys.readouterr()
    arguments = ["recover", "ilm", "--images", "images", "-o", "out", "--steps", "1", *QUICK]
    with full_disk(100_000):
        assert main(arguments) == 1
    told = capsys.readouterr().err
    assert told.startswith(f"Error: cannot write in {str(Path('out.run').absolute())!r}: ")
    assert told.endswith("File too large (os error 27)\n")
    assert list(Path("out.run").iterdir()) == []
    assert main([*arguments, "--resume"]) == 2
    assert "found none; leave out --resume to begin one" in capsys.readouterr().err
    assert main(arguments) == 0
    assert not Path("out.run").exists()


def test_a_held_out_share_that_cannot_be_read_is_named(capsys: Output) -> None:
    convert()
    Path("broken").mkdir()
    Path("broken/0.png").write_text("no image")
    arguments = ["recover", "ilm", "--images", "images", "--held-out-images", "broken", "-o", "out", *QUICK]
    assert main([*arguments, "--steps", "1"]) == 2
    assert "0.png" in capsys.readouterr().err
    assert main([*arguments, "--steps", "1", "--resume"]) == 2
    assert "expected a run to go on with" in capsys.readouterr().err


def test_after_training_the_original_norms_are_not_called_the_original(capsys: Output) -> None:
    convert()
    trained = ilmconvert.load_conversion("ilm")
    trained.model.conv1[0].weight.data.add_(0.01)
    trained.save("out")
    for command in (["verify", "out"], ["diff", "out", "--summary"], ["convert", "out", "-o", "again"]):
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            assert main(command) == 0
        assert "with the original norms back, it is not the original" in capsys.readouterr().err
    card = Path("out/README.md").read_text()
    assert "It was trained since." in card
    assert "Everything else is the original." in Path("ilm/README.md").read_text()
