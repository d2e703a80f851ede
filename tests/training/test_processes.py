"""Two real processes (gloo): DDP and FSDP take the course of one process, and go on after a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

import ilmconvert

pytestmark = pytest.mark.slow
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
LAUNCH = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1"]
LAUNCH += ["--mixed_precision", "no", "--dynamo_backend", "no"]
ARGUMENTS = ["recover", "ilm", "--images", "images", "--steps", "12", "--evaluate-every", "3", "--lr", "3e-4"]
ARGUMENTS += ["--input-size", "3,64,64", "--batch-size", "8", "--held-out", "0.3"]
NAMES = ("agreement", "kl", "cosine", "loss")


def command(launcher: list[str], output: str, *more: str) -> list[str]:
    module = ["-m", "ilmconvert"]
    return [sys.executable, *launcher, *module, *ARGUMENTS, "-o", output, *more]


def run(*arguments: Any, environment: dict[str, str] | None = None) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})}
    result = subprocess.run(command(*arguments), capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 0, result.stderr
    return result.stdout


def log(output: str) -> list[dict[str, float]]:
    return [json.loads(line) for line in Path(output, "recover.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("processes")
    for number in range(25):
        file = place / "images" / f"{number}.png"
        file.parent.mkdir(exist_ok=True)
        Image.effect_noise((70, 70), 5 * number).convert("RGB").save(file)
    ilmconvert.convert(timm.create_model("test_resnet", num_classes=6)).save(place / "ilm")
    return place


@pytest.fixture(autouse=True)
def _there(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)


def same_course(a: list[dict[str, float]], b: list[dict[str, float]]) -> bool:
    pairs = [(x[n], y[n]) for x, y in zip(a, b, strict=True) for n in NAMES if x[n] is not None]
    return all(x == pytest.approx(y, rel=1e-3, abs=1e-6) for x, y in pairs)


@pytest.mark.parametrize(
    ("launcher", "more", "environment"),
    [
        (TORCHRUN, [], {}),
        (TORCHRUN, ["--fsdp"], {}),
        (LAUNCH, [], {}),
        (LAUNCH, [], {"ACCELERATE_USE_FSDP": "true"}),
    ],
    ids=["torchrun-ddp", "torchrun-fsdp", "accelerate-ddp", "accelerate-fsdp"],
)
def test_as_one_process(launcher: list[str], more: list[str], environment: dict[str, str]) -> None:
    if not Path("one").exists():
        run([], "one")
    name = f"{launcher[1]}{'-fsdp' if more or environment else ''}"
    printed = run(launcher, name, *more, environment=environment)
    assert printed.count("training loss") == 1  # one process speaks
    assert same_course(log(name), log("one"))
    assert not Path(f"{name}.run").exists()


def workers(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.parametrize("more", [[], ["--fsdp"]], ids=["ddp", "fsdp"])
def test_killed_and_gone_on_with(more: list[str]) -> None:
    if not Path("one").exists():
        run([], "one")
    name = f"killed{len(more)}"
    process = subprocess.Popen(command(TORCHRUN, name, *more), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (Path(f"{name}.run/recover.jsonl").is_file() and len(log(f"{name}.run")) >= 3):
        assert process.poll() is None
        time.sleep(0.005)
    for worker in [process.pid, *workers(process.pid)]:
        os.kill(worker, signal.SIGKILL)
    process.wait()
    assert not Path(name).exists()
    run(TORCHRUN, name, "--resume", *more)
    assert same_course(log(name), log("one"))


def run_script(code: str) -> None:
    Path("script.py").write_text(code)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, *TORCHRUN, "script.py"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 0, result.stderr


def test_fsdp_shards() -> None:
    code = """
import torch, torch.nn as nn
from torch.distributed.tensor import DTensor
from ilmconvert.training import RecoverOptions, parameter_groups
from ilmconvert.training.processes import prepare, processes
from ilmconvert.training.state import full_weights
options = RecoverOptions(fsdp=True)
with processes(options) as accelerator:
    model = nn.Linear(6, 8)
    whole = model.weight.detach().clone()
    model, optimizer = prepare(accelerator, model, lambda: parameter_groups(model, lr=1e-3), options)
    assert isinstance(model.weight, DTensor) and model.weight.to_local().shape == (4, 6)
    assert {p for g in optimizer.param_groups for p in g["params"]} == set(model.parameters())
    assert full_weights(model)["weight"].shape == whole.shape
"""
    run_script(code)


@pytest.mark.parametrize("fsdp", [False, True])
def test_parameters_that_the_loss_does_not_reach(fsdp: bool) -> None:
    code = f"""
import torch, ilmconvert
from tests.models import AuxiliaryHead
torch.manual_seed(0)
model = AuxiliaryHead()
converted = ilmconvert.convert(model).model
x = torch.randn(12, 3, 8, 8)
held = torch.randn(4, 3, 8, 8)
recovery = ilmconvert.recover(model, converted, x, held_out_images=held, steps=3, batch_size=4, fsdp={fsdp}, lr=1e-3)
assert len(recovery.report.evaluations) == 4
"""
    run_script(code)


@pytest.mark.parametrize("fsdp", [False, True])
def test_a_batch_norm_that_stays_is_the_same_in_every_process(fsdp: bool) -> None:
    code = f"""
import os, torch, ilmconvert
from safetensors.torch import save_file
from tests.training.problem import conversion, images, original
model = original()
student = conversion(model, exclude="4").model
torch.nn.init.zeros_(student[-1].weight)
recovery = ilmconvert.recover(model, student, images(48), steps=4, batch_size=16, held_out=0.2, fsdp={fsdp}, lr=1e-2)
assert recovery.report.best.step > 0
save_file(recovery.model.state_dict(), f"{{os.environ['RANK']}}.safetensors")
"""
    run_script(code)
    first, second = (load_file(f"{rank}.safetensors") for rank in (0, 1))
    assert all(torch.equal(second[name], tensor) for name, tensor in first.items())
