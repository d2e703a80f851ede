"""The survey: workers that may die, records that survive, a walk of its own, and a page."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from ilmconvert.errors import CheckpointError, IlmconvertError, OutputExistsError, UsageError
from ilmconvert.graph import Inputs
from ilmconvert.survey import Record, SurveyOptions, coverage_page, is_page, read_log, run_survey
from ilmconvert.survey.examine import Task, examine
from ilmconvert.survey.libraries import library
from ilmconvert.survey.pool import Lost, run_tasks
from ilmconvert.survey.records import append
from ilmconvert.survey.table import Totals
from ilmconvert.survey.walk import norm_like


def task(name: str, source: str = "timm", *, real: bool = False, **fields: object) -> Record:
    return examine(Task(source, name, "real" if real else "meta", SurveyOptions(real=real, **fields)))


def test_record_of_a_model() -> None:
    record = task("test_efficientnet")
    assert (record.status, record.norms, record.converted) == ("ok", 13, {"BatchNormAct2d": 13})
    assert (record.whole, record.trained, record.ran, record.unaccounted) == (True, 13, 13, ())
    assert set(record.seconds) == {"build", "convert", "check"}
    assert record.parameters > record.added_parameters > 0


def test_real_tensors_are_compared() -> None:
    record = task("test_vit", real=True)
    assert record.exact
    assert record.difference is not None
    assert record.difference < 1e-5
    assert record.finite is True
    assert task("test_efficientnet", real=True).finite is True
    assert task("test_efficientnet").finite is None
    left = task("test_efficientnet", real=True, exact_only=True)
    assert left.status == "left out"
    assert min(left.seconds["build"], left.seconds["convert"]) > 0
    assert "more than the 1,000" in task("test_vit", real=True, max_parameters=1000).reason


def test_failure_keeps_reason_and_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ilmconvert.survey.libraries.of_timm.build", lambda name: nn.Linear(2, name))
    record = task("test_vit")
    assert record.status == "failed"
    assert record.reason.startswith("TypeError: ")
    assert "of_timm" in record.traceback or "examine" in record.traceback


def test_norm_that_the_search_misses_is_unaccounted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ilmconvert.norms.registry._suspect", lambda module: None)

    class Grn(nn.Module):
        def forward(self, x: object) -> object:
            return x

    class MyFrnThing(Grn):
        pass

    def build(name: str) -> nn.Module:
        model = timm.create_model(name)
        model.norm = nn.Sequential(model.norm, MyFrnThing())
        return model

    monkeypatch.setattr("ilmconvert.survey.libraries.of_timm.build", build)
    record = task("test_vit")
    assert (record.status, record.unaccounted) == ("failed", ("norm.1",))


def test_layer_that_loses_its_gradients_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    class Bypassing(nn.Module):
        """Takes another way around the second norm when it is no LayerNorm; nothing uses what the third returns."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.third = nn.LayerNorm(4), nn.LayerNorm(4), nn.LayerNorm(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.first(x)
            self.third(x)
            y = self.second(x)
            return y if type(self.second).__name__ == "LayerNorm" else x

    made = Inputs((torch.zeros(2, 4, device="meta"),))
    monkeypatch.setattr("ilmconvert.survey.libraries.of_timm.build", lambda name: Bypassing())
    monkeypatch.setattr("ilmconvert.survey.libraries.of_timm.inputs", lambda *_, **__: made)
    record = task("test_vit")
    assert (record.ran, record.trained) == (3, 1)
    assert record.problems == ("layers without gradients, whose norms had some: second",)


def test_walk_knows_norms_by_class_and_name() -> None:
    class ConvNormAct(nn.Sequential):
        pass

    class MyLayerNorm(nn.Module):
        pass

    block = ConvNormAct(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU())
    model = nn.Sequential(block, MyLayerNorm(), nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)), nn.RMSNorm(4))
    assert norm_like(model) == {"0.1": "BatchNorm2d", "1": "MyLayerNorm", "3": "RMSNorm"}


def work(what: str) -> str:
    if what == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "sleep":
        time.sleep(60)
    if what == "hoard":
        try:
            return str(len(bytearray(4_000_000_000)))
        except MemoryError:
            return "refused"
    return what.upper()


@pytest.mark.slow
def test_a_killed_or_late_worker_loses_one_task() -> None:
    running: list[list[str]] = []
    tasks = ["a", "die", "b", "sleep", "c", "hoard"]
    results = dict(run_tasks(work, tasks, jobs=2, time_limit=4, memory_limit=2, on_change=running.append))
    assert {k: v for k, v in results.items() if isinstance(v, str)} == {
        "a": "A",
        "b": "B",
        "c": "C",
        "hoard": "refused",
    }
    assert "died" in results["die"].reason
    assert "time limit" in results["sleep"].reason
    assert isinstance(results["die"], Lost)
    assert ["a", "die"] in running


@pytest.mark.slow
def test_survey_is_resumed(tmp_path: Path) -> None:
    file = tmp_path / "survey.jsonl"
    options = SurveyOptions(patterns=("test_vit", "test_mambaout"), jobs=2)
    first = run_survey(options, file)
    assert {r.name: r.status for r in first.records} == {"test_vit": "ok", "test_mambaout": "ok"}
    (session,) = first.sessions
    assert session.command == "ilmconvert survey test_vit test_mambaout --jobs 2"
    assert f"{session.command} --output FILE --markdown PAGE" in coverage_page(first)
    lines = file.read_text().splitlines()
    cut = next(line for line in lines if '"test_vit"' in line)
    file.write_text(cut + "\n" + '{"library": "timm", "na')  # interrupted while writing
    assert [r.name for r in read_log(file).records] == ["test_vit"]
    ran: list[str] = []
    again = run_survey(options, file, resume=True, on_record=lambda r: ran.append(r.name))
    assert ran == ["test_mambaout"]
    assert {r.name for r in again.records} == {"test_vit", "test_mambaout"}
    with pytest.raises(OutputExistsError, match="--resume"):
        run_survey(options, file)


def children(pid: int) -> list[int]:
    return [int(n) for n in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def alive(pid: int) -> bool:
    file = Path(f"/proc/{pid}/stat")
    return file.exists() and file.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_survey_goes_on_after_its_own_process_was_killed(tmp_path: Path) -> None:
    file, names = tmp_path / "survey.jsonl", ("test_vit", "test_mambaout", "test_efficientnet", "test_resnet")
    command = [sys.executable, "-m", "ilmconvert", "survey", *names, "--output", str(file)]
    parent = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(lambda: file.exists() and file.read_text().count("\n") > 0, 240)
    workers = children(parent.pid)
    parent.kill()
    parent.wait()
    wait_for(lambda: not any(map(alive, workers)), 30)
    before = {r.name for r in read_log(file).records}
    assert 1 <= len(before) < len(names)
    done = subprocess.run([*command, "--resume"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    log = read_log(file)
    assert {r.name: r.status for r in log.records} == dict.fromkeys(names, "ok")
    assert [s.models for s in log.sessions] == [len(names) - len(before)]


def wait_for(holds: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.slow
def test_failed_models_are_run_again_on_resume(tmp_path: Path) -> None:
    file = tmp_path / "survey.jsonl"
    append(file, [Record("timm", "test_vit", "meta", "lost", reason="killed")])
    log = run_survey(SurveyOptions(patterns=("test_vit",)), file, resume=True)
    assert [(r.name, r.status) for r in log.records] == [("test_vit", "ok")]


def test_records_survive_a_round_trip(tmp_path: Path) -> None:
    record = Record("timm", "a", "real", "ok", norms=3, converted={"LayerNorm": 3}, difference=0.0, unaccounted=("x",))
    append(tmp_path / "log", [record])
    assert read_log(tmp_path / "log").records == (record,)
    (tmp_path / "log").write_text('{"library": "timm"\n{}\n')
    with pytest.raises(CheckpointError, match="log:1"):
        read_log(tmp_path / "log")


def test_page_adds_up_and_replaces_only_itself(tmp_path: Path) -> None:
    records = [
        Record("timm", "a", "real", "ok", model="A", norms=3, converted={"LayerNorm": 3}, exact=True, whole=True,
               difference=2e-7, finite=True, seconds={"build": 1.0, "convert": 0.5, "check": 1.0}),
        Record("timm", "b", "meta", "failed", reason="boom", model="B", norms=2, skipped={"GRN: why": 2}, untraced=1),
        Record("timm", "c", "real", "left out", reason="12,345 parameters, more than the 10 asked for"),
        Record("timm", "d", "real", "left out", reason="inexact", seconds={"build": 1.0, "convert": 2.5}),
    ]  # fmt: skip
    rows = dict(Totals(records).rows())
    assert rows["models: all checks passed, of all"] == "1 of 2"
    assert rows["of those run with real tensors, equal within 1e-5"] == "1 of 1 (worst 2.0e-07)"
    assert rows["time to convert over time to build (real tensors)"] == "median 1.50, worst 2.50 of 2 models"
    assert rows["run with real tensors: outputs and gradients finite"] == "1 of 1"
    assert rows["not taken: more parameters than the 10 asked for"] == "1"
    append(tmp_path / "log", records)
    log = read_log(tmp_path / "log")
    page = tmp_path / "page.md"
    assert not is_page(page)
    page.write_text(coverage_page(log))
    assert is_page(page)
    assert "| b | failed | boom |" in page.read_text()
    page.write_text("mine")
    assert not is_page(page)


def test_wrong_requests() -> None:
    with pytest.raises(UsageError, match="expected the pattern 'nonsense'"):
        SurveyOptions(patterns=("nonsense",)).models()
    with pytest.raises(UsageError, match="jobs to be positive"):
        SurveyOptions(jobs=0)
    with pytest.raises(UsageError, match="expected a library among"):
        library("keras")
    first, second = (SurveyOptions(sample=5, seed=s).models() for s in (0, 1))
    assert len(first) == 5
    assert first != second
    assert first == SurveyOptions(sample=5, seed=0).models()


def test_missing_library_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ilmconvert.survey.libraries.of_transformers", None)
    with pytest.raises(IlmconvertError, match=r"ilmconvert\[survey\]"):
        library("transformers")


def test_libraries_name_their_models() -> None:
    assert len(library("timm").names()) > 1300
    assert {"raft_small", "maskrcnn_resnet50_fpn", "r3d_18", "fcn_resnet50"} <= set(library("torchvision").names())
    assert {"vit", "swin", "convnextv2", "dinov2", "bert", "llama"} <= set(library("transformers").names())
    assert "unet/resnet18" in library("segmentation_models_pytorch").names()
    assert library("torchvision").needs_values("ssd300_vgg16")
    assert not library("torchvision").needs_values("raft_small")


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("torchvision", "resnet18"),
        pytest.param("torchvision", "raft_small", marks=pytest.mark.slow),
        ("torchvision", "mc3_18"),
        pytest.param("torchvision", "regnet_x_400mf", marks=pytest.mark.slow),
        pytest.param("torchvision", "lraspp_mobilenet_v3_large", marks=pytest.mark.slow),
        pytest.param("torchvision", "quantized_mobilenet_v3_large", marks=pytest.mark.slow),
        ("torchvision", "ssdlite320_mobilenet_v3_large"),
        ("transformers", "vit"),
        ("transformers", "swin"),
        ("transformers", "convnextv2"),
        ("transformers", "dinov2"),
        ("transformers", "bert"),
        ("transformers", "llama"),
        ("transformers", "gemma2"),
        ("transformers", "t5"),
        ("segmentation_models_pytorch", "unet/resnet18"),
        ("segmentation_models_pytorch", "segformer/mit_b0"),
    ],
)
def test_models_of_every_kind_pass(source: str, name: str) -> None:
    record = task(name, source)
    assert record.status == "ok", record.reason
    assert record.norms == sum(record.converted.values()) + sum(record.skipped.values()) > 0
    assert record.trained == record.ran > 0
    if record.tensors == "real" and record.exact:
        assert record.difference < 1e-5
