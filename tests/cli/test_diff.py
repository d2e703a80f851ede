"""``ilmconvert diff`` as a user meets it."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
from ilmconvert_cli.main import main
from PIL import Image

from ilmconvert.comparison import GraphDiff
from tests.helpers import needs_dot

Output = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def _in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("saved") / "vit-ilm"
    assert main(["convert", "test_vit", "--output", str(folder), "--json"]) == 0
    return str(folder)


def test_a_saved_conversion_against_its_original(capsys: Output, saved: str) -> None:
    assert main(["diff", saved, "--numerics", "random", "--limit", "1"]) == 0
    printed = capsys.readouterr().out
    assert "13 changed" in printed
    assert "~       norm1  LayerNorm -> ILMNorm  error 0.0e+00, cosine 1.000000" in printed
    assert "\x1b" not in printed
    assert printed.isascii()
    assert main(["diff", saved, "--summary"]) == 0
    assert len(capsys.readouterr().out.splitlines()) <= 10
    assert main(["diff", "test_vit", saved, "--format", "json"]) == 0
    diff = GraphDiff.from_dict(json.loads(capsys.readouterr().out))
    assert diff.counts["changed"] == 13
    assert (diff.before.name, diff.after.name) == ("test_vit", saved)


def test_exit_codes(capsys: Output, saved: str) -> None:
    assert main(["diff", "test_vit", "test_vit", "--exit-code", "--numerics", "random"]) == 0
    assert "error 0.0e+00" in capsys.readouterr().out  # the same random weights
    assert main(["diff", saved, "--exit-code"]) == 1
    assert main(["diff", saved]) == 0
    assert main(["diff", "test_vit"]) == 2
    assert "expected two models, or one folder saved by ilmconvert; got 'test_vit' alone" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("b", "options", "message"),
    [
        ("failing:nothing", [], "no attribute 'nothing'"),
        ("failing:net", ["--input-size", "3,9,9", "--numerics", "random"], "RuntimeError: no forward today"),
        ("failing:odd", [], "unexpected ZeroDivisionError: division by zero"),
        ("failing:net", ["--format", "unified", "--output", "."], "got the folder"),
        ("failing:net", ["--no-such-option"], "No such option"),
    ],
)
def test_failures_are_told_from_differences(capsys: Output, b: str, options: list[str], message: str) -> None:
    source = (
        "from tests.models import Failing as net\n\nclass Odd(int):\n    def __repr__(self):\n        return 1 / 0\n\n"
        "def odd():\n    made = net()\n    made.odd = Odd()\n    return made\n"
    )
    Path("failing.py").write_text(source)
    code = main(["diff", "failing:net", b, *options])
    assert code in (1, 2)
    first = capsys.readouterr().err
    assert message in first
    assert main(["diff", "failing:net", b, *options, "--exit-code"]) == 2
    assert capsys.readouterr().err == first


def test_values_of_random_weights_are_told_as_such(capsys: Output, saved: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        for more in ([], ["--numerics", "random", "--limit", "1"]):
            assert main(["diff", "test_vit", saved, "--summary", *more]) == 0
            assert ("test_vit has random weights" in capsys.readouterr().err) is bool(more)


def test_the_terminals_width(capsys: Output, saved: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def longest(*options: str) -> int:
        assert main(["diff", saved, *options]) == 0
        return max(map(len, capsys.readouterr().out.splitlines()))

    monkeypatch.setenv("COLUMNS", "120")
    assert 80 < longest() <= 120
    monkeypatch.setenv("COLUMNS", "50")
    assert longest() <= 50
    assert main(["diff", saved, "--output", "d.txt"]) == 0  # a file is the same everywhere
    assert 50 < max(map(len, Path("d.txt").read_text().splitlines())) <= 80


@pytest.mark.parametrize(
    ("name", "start"),
    [
        ("d.txt", "test_resnet -> test_vit"),
        ("d.diff", "--- a/test_resnet"),
        ("d.md", "### test\\_resnet → test\\_vit"),
        ("d.json", '{\n "version": 1'),
        ("d.html", "<!doctype html>"),
        pytest.param("d.svg", "<?xml", marks=needs_dot),
    ],
)
def test_output_by_its_ending(capsys: Output, name: str, start: str) -> None:
    arguments = ["diff", "test_resnet", "test_vit", "--output", name]
    assert main(arguments) == 0
    assert Path(name).read_text(encoding="utf-8").startswith(start)
    assert main(arguments) == 2
    assert "exists; choose another or give --force" in capsys.readouterr().err
    assert main([*arguments, "--force"]) == 0
    assert [p.name for p in Path.cwd().iterdir()] == [name]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-o", "x.docx"], "expected --output FILE ending in"),
        (["-o", "missing/x.html"], "expected an existing folder"),
        (["-o", ".", "--format", "html"], "expected a file to write, got the folder"),
        (["--all", "--format", "json"], "expected --all and --summary with --format text"),
        (["--all", "--summary"], "got both"),
        (["--force"], "expected --force with --output FILE"),
        (["--block", "stem"], "expected --block with --format svg or png"),
        (["--format", "png"], "expected --output FILE with --format png"),
        (["--limit", "2"], "expected --limit with --numerics"),
        (["--numerics", "nowhere"], "expected a folder of images at 'nowhere'"),
        (["--format", "svg", "--block", "nowhere"], "expected the path of a block, got 'nowhere'"),
    ],
)
def test_wrong_requests(capsys: Output, arguments: list[str], message: str) -> None:
    assert main(["diff", "test_resnet", "test_resnet", *arguments]) == 2
    assert message in capsys.readouterr().err.replace("\n", " ")
    assert list(Path.cwd().iterdir()) == []


def test_factories_and_sizes(capsys: Output) -> None:
    Path("mymodels.py").write_text(
        "from tests.models import small_cnn\n\ndef net(channels=8):\n    return small_cnn(channels)\n"
    )
    assert main(["diff", "mymodels:net", "mymodels:net", "--input-size", "3,9,9", "--numerics", "random"]) == 0
    assert "MACs:" in capsys.readouterr().out
    assert main(["diff", "mymodels:net", "mymodels:net", "--numerics", "random"]) == 2
    assert "give --input-size 3,224,224" in capsys.readouterr().err


def test_names_that_the_terminal_cannot_print(capsys: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    import io
    import sys

    source = (
        "from torch import nn\n\ndef net():\n    m = nn.Module()\n    m.add_module('größe', nn.ReLU())\n    return m\n"
    )
    Path("odd.py").write_text(source, encoding="utf-8")
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    assert main(["diff", "odd:net", "odd:net", "--all"]) == 0
    out.flush()
    assert b"gr\\xf6\\xdfe" in out.buffer.getvalue()  # type: ignore[attr-defined]


def test_colour_only_on_a_terminal(capsys: Output, saved: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    assert main(["diff", saved]) == 0
    assert "\x1b[33m~" in capsys.readouterr().out
    monkeypatch.setenv("NO_COLOR", "1")
    assert main(["diff", saved]) == 0
    assert "\x1b[33m" not in capsys.readouterr().out


def test_only_images_that_were_read_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    Path("photos").mkdir()
    for number in range(3):
        Image.effect_noise((40, 40), 30 * number).convert("RGB").save(f"photos/{number}.png")
    Path("photos/broken.png").write_bytes(b"no image")
    assert main(["diff", "test_resnet", "test_resnet", "--numerics", "photos", "--summary"]) == 0
    assert "(on 3 images from photos; 1 note)" in capsys.readouterr().out
