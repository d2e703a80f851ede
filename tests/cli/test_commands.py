"""The command line as a user meets it: what it prints, what it writes, what it ends with."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
import timm
import torch
from ilmconvert_cli.main import cli, main
from safetensors.torch import save_file

import ilmconvert
from ilmconvert.nn import ILMNorm
from ilmconvert.wording import brief
from tests.helpers import randomize_norms, same_state

Output = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def _in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_convert_inspect_and_verify(capsys: Output) -> None:
    assert main(["convert", "test_efficientnet", "--output", "out", "--model-arg", "num_classes=4"]) == 0
    printed = capsys.readouterr().out
    assert "EfficientNet: 13 norms converted, 0 skipped" in printed
    assert "BatchNormAct2d -> ILM layer (1 group)" in printed
    assert "parameters added: " in printed
    assert "warning: 13 norms with the running statistics of an untrained network (bn1, blocks.0.0.bn1, " in printed
    assert printed.count("warning") == 1
    assert "ilmconvert verify out" in printed
    model = ilmconvert.load("out")
    assert model.num_classes == 4
    assert sum(isinstance(m, ILMNorm) for m in model.modules()) == 13

    assert main(["verify", "out"]) == 0
    printed = capsys.readouterr().out
    assert "13 of 13 run" in printed
    assert "all checks passed" in printed

    assert main(["inspect", "out"]) == 0  # its original norms
    assert "13 norms would be converted, 0 skipped" in capsys.readouterr().out


def test_inspect_lists_every_site(capsys: Output) -> None:
    assert main(["inspect", "test_vit", "--include", "blocks.*"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("ILM layer (per token)") == 12 + 1
    assert "skipped: its path matches none of the included patterns" in printed
    assert "2x101x64" in printed
    assert "the converted model starts with the original's outputs" in printed


def test_plan_goes_through_a_file_edited(capsys: Output, tmp_path: Path) -> None:
    assert main(["inspect", "test_resnet", "--json", "--bn-to", "group", "--group-size", "8"]) == 0
    plan = json.loads(capsys.readouterr().out)
    for decision in plan["decisions"][:2]:
        decision.update(action="skip", reason="by hand")
    Path("plan.json").write_text(json.dumps(plan))
    assert main(["convert", "test_resnet", "--plan", "plan.json", "--dry-run"]) == 0
    assert "skipped 2 x BatchNorm2d: by hand" in capsys.readouterr().out
    assert main(["convert", "test_resnet", "--plan", "plan.json", "-o", "out", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["converted"], len(report["skipped"])) == (len(plan["decisions"]) - 2, 2)
    model = ilmconvert.load("out")
    assert sum(isinstance(m, ILMNorm) for m in model.modules()) == report["converted"]


def test_dry_run_writes_nothing(capsys: Output, tmp_path: Path) -> None:
    assert main(["convert", "test_resnet", "-o", "out", "--dry-run", "--json"]) == 0
    assert ilmconvert.Plan.from_json(capsys.readouterr().out).converted
    assert list(tmp_path.iterdir()) == []


def test_checkpoint_is_loaded(capsys: Output) -> None:
    source = randomize_norms(timm.create_model("test_vit"))
    save_file(source.state_dict(), "weights.safetensors")
    assert main(["convert", "test_vit", "--checkpoint", "weights.safetensors", "-o", "out"]) == 0
    x = torch.randn(1, 3, 160, 160)
    with torch.no_grad():
        assert torch.allclose(ilmconvert.load("out")(x), source.eval()(x), atol=1e-5)


def test_factory_model_with_arguments(capsys: Output) -> None:
    Path("mymodels.py").write_text(
        "from tests.models import small_cnn\n\ndef net(channels=8):\n    return small_cnn(channels)\n"
    )
    arguments = ["mymodels:net", "--model-arg", "channels=24", "--input-size", "3,12,12"]
    assert main(["convert", *arguments, "-o", "out"]) == 0
    assert ilmconvert.load("out", trust_factory=True)[0].out_channels == 24
    assert main(["verify", "out", "--input-size", "3,12,12"]) == 1
    assert "--trust-factory" in capsys.readouterr().err
    assert main(["verify", "out", "--trust-factory", "--input-size", "3,12,12", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["passed"] is True
    assert main(["convert", "out", "--trust-factory", "-o", "again"]) == 0
    assert ilmconvert.load("again", trust_factory=True)[0].out_channels == 24
    capsys.readouterr()
    assert main(["verify", "out", "--trust-factory"]) == 2
    assert "declares no input size" in capsys.readouterr().err


def test_what_is_printed_after_a_conversion_can_be_run(capsys: Output) -> None:
    folder = f"{'long' * 30}[b] ü (1)"
    assert main(["convert", "tests.models:small_cnn", "--input-size", "3,12,12", "-o", folder]) == 0
    check, use = capsys.readouterr().out.splitlines()[-2:]
    assert main([*shlex.split(check)[3:], "--input-size", "3,12,12"]) == 0
    names = {"ilmconvert": ilmconvert}
    exec(use.removeprefix("  use it:   "), names)
    assert same_state(names["model"], ilmconvert.load(folder, trust_factory=True))


def test_saved_folder_is_converted_anew_from_its_original_norms(capsys: Output) -> None:
    assert main(["convert", "test_resnet", "-o", "a"]) == 0
    assert main(["convert", "a", "-o", "b", "--bn-to", "instance"]) == 0
    first, second = ilmconvert.load_conversion("a"), ilmconvert.load_conversion("b")
    assert same_state(first.revert(), second.revert())
    assert second.plan.options.bn_to == "instance"


def test_plan_of_another_model_is_refused_in_a_dry_run_too(capsys: Output) -> None:
    assert main(["inspect", "test_resnet", "--json"]) == 0
    Path("plan.json").write_text(capsys.readouterr().out)
    assert main(["convert", "test_vit", "--plan", "plan.json", "--dry-run"]) == 1
    assert "the plan has none for blocks.0.norm1" in capsys.readouterr().err


def test_verify_in_mode_paper_does_not_expect_equality(capsys: Output) -> None:
    assert main(["convert", "test_vit", "--mode", "paper", "-o", "out"]) == 0
    assert main(["verify", "out"]) == 0
    assert "equality is not expected" in capsys.readouterr().out
    assert main(["verify", "out", "--tolerance", "-1"]) == 2


def test_verify_fails_on_a_damaged_model(capsys: Output) -> None:
    conversion = ilmconvert.convert(timm.create_model("test_vit"))
    torch.nn.init.normal_(conversion.model.norm.bias)
    conversion.save("out")
    assert main(["verify", "out"]) == 1
    printed = capsys.readouterr().out
    assert "FAILED" in printed
    assert "verification failed" in printed


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["inspect", "resnt50"], 2, "did you mean resnet50"),
        (["inspect", "no.such.module:thing"], 2, "expected 'no.such.module:thing' to name a factory"),
        (["inspect", "tests.models:not_a_model"], 1, "to return a torch.nn.Module, got int"),
        (["inspect", "tests.models:missing"], 2, "to name a factory that can be imported"),
        (["inspect", "test_vit", "--model-arg", "depth"], 2, "expected KEY=VALUE"),
        (["inspect", "test_vit", "--model-arg", "wrong=1"], 1, "expected 'test_vit' to build a model, but it failed"),
        (["inspect", "test_vit", "--input-size", "3,x"], 2, "expected sizes such as 3,224,224"),
        (["inspect", "test_vit", "--include", "nothing.*"], 2, "expected the pattern 'nothing.*' to match"),
        (["inspect", "test_vit", "--groups", "8"], 2, "choose the groups for bn_to='group'"),
        (["convert", "test_vit"], 2, "Missing option '--output'"),
        (["convert", "test_vit", "-o", "out", "--plan", "none.json"], 2, "the plan 'none.json' cannot be read"),
        (
            ["convert", "test_vit", "-o", "out", "--plan", "x", "--groups", "8"],
            2,
            "expected --plan alone, got --groups",
        ),
        (["convert", "test_vit", "-o", "."], 2, "holds the working directory"),
        (
            ["convert", "test_vit", "--checkpoint", "none.pth", "-o", "out"],
            2,
            "expected a checkpoint file at 'none.pth'",
        ),
        (
            ["convert", "test_vit", "--pretrained", "--checkpoint", "x.pth", "-o", "out"],
            2,
            "expected --pretrained or --checkpoint, got both",
        ),
        (["convert", "test_vit", "-o", "out", "--input-size", "3,160"], 2, "expected an input size like (3, 160, 160)"),
        (
            ["convert", "test_vit", "-o", "out", "--input-size", "1,160,160"],
            2,
            "for VisionTransformer, got (1, 160, 160)",
        ),
        (["inspect", "test_vit", "--input-size", "3,99999999,99999999"], 2, "that memory holds, got (3, 99999999, 999"),
        (["inspect", "test_vit", "--input-size", f"3,{10**30},1"], 2, "expected an input size that memory holds"),
        (["verify", "nowhere"], 2, "expected a folder saved by ilmconvert"),
        (["frobnicate"], 2, "No such command"),
    ],
)
def test_wrong_requests_get_one_clear_error(
    arguments: list[str], code: int, message: str, capsys: Output, tmp_path: Path
) -> None:
    assert main(arguments) == code
    printed = capsys.readouterr()
    assert message in printed.err
    assert "Traceback" not in printed.err
    assert printed.out == ""
    assert list(tmp_path.iterdir()) == []


def test_pretrained_without_a_network_is_one_clear_error(capsys: Output) -> None:
    assert main(["convert", "resnet18", "--pretrained", "-o", "out"]) == 1
    error = capsys.readouterr().err
    assert "could not load the pretrained weights of 'resnet18'" in error
    assert "--checkpoint FILE" in error
    assert not Path("out").exists()


def test_unwritable_place_and_model_without_norms(capsys: Output) -> None:
    assert main(["convert", "test_vit", "-o", "/proc/nowhere"]) == 1
    assert capsys.readouterr().err == "Error: cannot write in '/proc': No such file or directory\n"
    assert main(["inspect", "vgg11"]) == 0
    assert capsys.readouterr().out.startswith("\nVGG: 0 norms would be converted, 0 skipped")


def test_warnings_are_one_line() -> None:
    command = [
        sys.executable,
        "-m",
        "ilmconvert",
        "convert",
        "test_resnet",
        "--model-arg",
        "features_only=true",
        "-o",
        "o",
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stderr.startswith("Warning: test_resnet does not rebuild this model, so load() will need model=")
    assert result.stderr.count("\n") == 1


def test_a_defect_is_told_in_one_line(capsys: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ilmconvert, "inspect", lambda *_, **__: 1 / 0)
    assert main(["inspect", "test_vit"]) == 1
    assert "unexpected ZeroDivisionError: division by zero" in capsys.readouterr().err


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_too_little_memory_is_no_defect(error: Exception, capsys: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(ilmconvert, "inspect", fail)
    assert main(["inspect", "test_vit"]) == 1
    assert capsys.readouterr().err == f"Error: {brief(error)}\n"


def test_python_dash_m() -> None:
    command = [sys.executable, "-m", "ilmconvert", "--version"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == f"ilmconvert, version {ilmconvert.__version__}"


@pytest.mark.parametrize("name", sorted(cli.commands))
def test_every_command_and_option_has_help(name: str) -> None:
    command = cli.commands[name]
    assert command.help
    for parameter in command.params:
        assert parameter.param_type_name == "argument" or parameter.help, parameter.name


def test_installed_script_runs(tmp_path: Path) -> None:
    script = Path(sys.executable).parent / "ilmconvert"
    result = subprocess.run([script, "inspect", "test_resnet"], capture_output=True, text=True, check=False)
    assert result.returncode == 0
    assert "norms would be converted" in result.stdout
    assert "\x1b[" not in result.stdout  # plain text when piped


def test_survey_writes_records_and_page(capsys: Output) -> None:
    arguments = ["survey", "test_vit", "test_resnet", "-o", "survey.jsonl", "--markdown", "coverage.md"]
    assert main(arguments) == 0
    assert "2 of 2" in capsys.readouterr().out
    assert "| test_vit | ok | meta | 13 | 13 | 0 | whole | exact |" in Path("coverage.md").read_text()
    assert main(arguments) == 2
    assert main([*arguments, "--resume"]) == 0
    assert len(Path("survey.jsonl").read_text().splitlines()) == 3  # two models, one session: nothing was run again
    assert main(["survey", "nonsense"]) == 2
    assert main(["survey", "--resume"]) == 2
    assert "expected --output FILE to resume from" in capsys.readouterr().err
    Path("notes.md").write_text("mine")
    for page in ("notes.md", "missing/page.md"):  # told before any model is run
        assert main(["survey", "test_vit", "--markdown", page]) == 2
        said = capsys.readouterr()
        assert (said.out, said.err.count("\n")) == ("", 1)


def test_a_checkpoint_from_before_num_batches_tracked(capsys: Output) -> None:
    model = randomize_norms(timm.create_model("test_resnet"))
    old = {name: value for name, value in model.state_dict().items() if not name.endswith("num_batches_tracked")}
    torch.save(old, "old.pt")
    assert main(["convert", "test_resnet", "--checkpoint", "old.pt", "-o", "out"]) == 0
    state = ilmconvert.load_conversion("out").revert().state_dict()
    assert all(torch.equal(state[name], value) for name, value in old.items())


def test_a_closed_standard_output_is_no_failure() -> None:
    command = [sys.executable, "-m", "ilmconvert", "inspect", "test_resnet"]
    result = subprocess.run(["sh", "-c", '"$@" >&-', "sh", *command], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")


SLOW_DISK = """
import sys, time
import ilmconvert.checkpoint.folder
from ilmconvert_cli.main import main
ilmconvert.checkpoint.folder._write_weights = lambda *_: time.sleep(60)
sys.exit(main(["convert", "test_resnet", "-o", "out"]))
"""


def test_sigterm_leaves_nothing_behind(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", SLOW_DISK], stderr=subprocess.PIPE, text=True)
    while not list(tmp_path.iterdir()):
        assert process.poll() is None
        time.sleep(0.01)
    process.terminate()
    _, told = process.communicate()
    assert (process.returncode, told) == (143, "\nAborted.\n")
    assert list(tmp_path.iterdir()) == []


def test_a_path_that_the_terminal_cannot_spell_is_no_failure(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ilmconvert", "convert", "test_resnet", "-o", "ünä"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert (result.returncode, result.stderr) == (0, "")
    assert "saved to \\xfcn\\xe4\n" in result.stdout
    assert ilmconvert.load("ünä").num_classes == 1000


def test_inputs_that_do_not_fit_are_told_once(capfd: pytest.CaptureFixture[str]) -> None:
    Path("narrow.py").write_text(
        "from torch import nn\ndef net(): return nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8))\n"
    )
    assert main(["convert", "narrow:net", "--input-size", "3,224", "--dry-run"]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    assert out.count("could not be run on fake tensors") == 1


def test_the_next_step_that_is_printed_works(capsys: Output, tmp_path: Path) -> None:
    """For a model that declares no size too."""
    assert main(["convert", "tests.models:small_cnn", "-o", "saved", "--input-size", "3,16,16"]) == 0
    (hint,) = [line for line in capsys.readouterr().out.splitlines() if "check it" in line]
    command = hint.partition("ilmconvert ")[2].split()
    assert command == ["verify", "saved", "--trust-factory", "--input-size", "3,16,16"]
    assert main(command) == 0


@pytest.mark.filterwarnings("ignore:test_resnet does not rebuild")
def test_no_next_step_is_printed_that_cannot_work(capsys: Output) -> None:
    assert main(["convert", "tests.models:small_cnn", "-o", "sizeless"]) == 0
    check = capsys.readouterr().out.splitlines()[-2]
    assert check == "  check it: ilmconvert verify sizeless --trust-factory --input-size C,H,W"
    assert main(shlex.split(check.replace("C,H,W", "3,16,16"))[3:]) == 0
    capsys.readouterr()
    assert main(["convert", "test_resnet", "--model-arg", "features_only=true", "-o", "features"]) == 0
    use, check = capsys.readouterr().out.splitlines()[-2:]
    names = {"ilmconvert": ilmconvert, "the_rebuilt_original": timm.create_model("test_resnet", features_only=True)}
    exec(use.removeprefix("  use it:   "), names)
    assert eval(check.removeprefix("  check it: "), names).passed
