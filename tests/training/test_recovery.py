"""Recovery: it recovers, never ends below its start, and leaves everything else as it was."""

from __future__ import annotations

import copy
import json
import math
import random
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import IterableDataset, TensorDataset

import ilmconvert
from ilmconvert.errors import CheckpointError, IlmconvertError, ModelError, UsageError
from ilmconvert.metrics import Comparison, Similarity, kl_divergence
from ilmconvert.nn import ILMNorm
from ilmconvert.training import Evaluation
from ilmconvert.training.losses import FeatureMatching, distillation
from ilmconvert.training.records import records
from ilmconvert.training.trainer import _schedule
from tests.helpers import same_state
from tests.training.problem import conversion, images, original

SHORT = {"steps": 60, "evaluate_every": 20, "lr": 3e-3, "held_out": 0.25}


@pytest.fixture(scope="module")
def teacher() -> nn.Module:
    return original()


@pytest.fixture
def student(teacher: nn.Module) -> nn.Module:
    return conversion(teacher).model


def another(model: nn.Module) -> nn.Module:
    """Another model of the same kind."""
    other = copy.deepcopy(model)
    nn.init.normal_(other[0].weight)
    return other


def measure(teacher: nn.Module, model: nn.Module, x: Tensor) -> Similarity:
    comparison = Comparison()
    with torch.no_grad():
        comparison.update(teacher(x), model.eval()(x))
    return comparison.result()


@pytest.mark.parametrize("more", [{}, {"features": 0.1}, {"temperature": 4.0}, {"precision": "bf16"}])
def test_agreement_rises(teacher: nn.Module, student: nn.Module, more: dict[str, Any]) -> None:
    before = {n: p.clone() for n, p in student.named_parameters()}
    held_out, x = images()[:50], images()[50:]
    recovery = ilmconvert.recover(teacher, student, x, held_out_images=held_out, **SHORT | more)
    start, best = recovery.report.start.measured, recovery.report.best.measured
    assert best.agreement >= start.agreement + 0.1
    assert best.kl < start.kl / 5
    assert asdict(measure(teacher, recovery.model, held_out)) == pytest.approx(asdict(best))
    assert asdict(measure(teacher, student, held_out)) == pytest.approx(asdict(start))
    assert [e.step for e in recovery.report.evaluations] == [0, 20, 40, 60]
    assert all(torch.equal(p, before[n]) for n, p in student.named_parameters())


@pytest.mark.parametrize(("lr", "stopped"), [(300.0, None), (1e30, "diverged")])
def test_never_below_the_start(teacher: nn.Module, student: nn.Module, lr: float, stopped: str | None) -> None:
    recovery = ilmconvert.recover(teacher, student, images(), **SHORT | {"lr": lr, "clip": 0.0, "held_out": 0.5})
    report = recovery.report
    assert report.best is report.start
    assert same_state(recovery.model, student)
    assert "no step improved on the start" in str(report)
    if stopped:
        assert report.stopped == stopped
        assert len(report.evaluations) == 2
        assert "try a smaller learning rate" in str(report)


def test_only_the_ilm_layers_train_when_the_rest_is_frozen(teacher: nn.Module, student: nn.Module) -> None:
    student[0].weight.requires_grad_(False)
    recovery = ilmconvert.recover(teacher, student, images(), freeze=True, **SHORT | {"lr": 1e-2})
    after = dict(recovery.model.named_parameters())
    changed = {n for n, p in student.named_parameters() if not torch.equal(p, after[n])}
    assert recovery.report.best.step > 0
    assert {n.partition(".")[0] for n in changed} == {"1", "4"}
    assert isinstance(recovery.model[1], ILMNorm)
    assert recovery.report.trained == sum(p.numel() for layer in (student[1], student[4]) for p in layer.parameters())
    assert not recovery.model[0].weight.requires_grad
    assert recovery.model[9].weight.requires_grad


def test_norms_that_stay_keep_their_statistics_when_frozen(teacher: nn.Module) -> None:
    student = conversion(teacher, exclude="1").model
    runs = {
        freeze: ilmconvert.recover(teacher, student, images(60), freeze=freeze, **SHORT | {"steps": 20}).model
        for freeze in (True, False)
    }
    assert torch.equal(runs[True][1].running_mean, student[1].running_mean)
    assert not torch.equal(runs[False][1].running_mean, student[1].running_mean)


def test_labels_are_learned(student: nn.Module) -> None:
    x = images(160)
    labels = (x.mean((1, 2, 3)) > 0).long() + 2 * (x[:, 0].mean((1, 2)) > 0).long()
    recovery = ilmconvert.recover(None, student, TensorDataset(x, labels), labels=True, **SHORT)
    start, best = recovery.report.start.measured, recovery.report.best.measured
    assert (recovery.report.figure, start.answers) == ("accuracy", 40)
    assert best.accuracy > max(start.accuracy, 0.6)
    batches = zip(x.split(32), labels.split(32), strict=True)
    again = ilmconvert.recover(None, student, batches, labels=True, **SHORT)
    assert same_state(again.model, recovery.model)


def test_random_state_and_modes_are_left_alone(teacher: nn.Module, student: nn.Module) -> None:
    random.seed(3)
    torch.manual_seed(3)
    wanted = random.random(), torch.rand(1)
    random.seed(3)
    torch.manual_seed(3)
    student.train()
    recovery = ilmconvert.recover(teacher, student, images(20), steps=2, batch_size=8)
    assert (random.random(), torch.rand(1)) == wanted
    assert recovery.model.training
    assert not teacher.training
    assert all(p.requires_grad for p in recovery.model.parameters())


def test_half_precision_models_train_in_float32_and_come_back_in_half(teacher: nn.Module) -> None:
    low = conversion(teacher.bfloat16()).model
    try:
        recovery = ilmconvert.recover(teacher, low, images(60), **SHORT | {"steps": 40})
    finally:
        teacher.float()
    assert {p.dtype for p in recovery.model.parameters()} == {torch.bfloat16}
    assert recovery.report.best.measured.kl < recovery.report.start.measured.kl


def test_a_single_logit_is_learned_as_a_yes_or_no() -> None:
    teacher = original()
    teacher[-1] = nn.Linear(32, 1)
    student, x = conversion(teacher).model, images(16)
    losses = [
        ilmconvert.recover(teacher, student, *given, steps=1, batch_size=8, held_out=0.5, **how)
        .report.evaluations[1]
        .loss
        for given, how in (((x,), {}), (([(x, torch.arange(16) % 2)],), {"labels": True}))
    ]
    assert losses[0] > 1e-4  # a softmax over one class is 1 whatever the models say
    assert 0.3 < losses[1] < 1.5


def test_a_time_limit_is_kept(teacher: nn.Module, student: nn.Module) -> None:
    told = []
    recovery = ilmconvert.recover(
        teacher, student, images(40), minutes=3 / 60, batch_size=8, progress=lambda *a: told.append(a)
    )
    assert recovery.report.evaluations[-1].seconds < 10
    assert recovery.report.evaluations[-1].step > 1
    assert recovery.report.evaluations[-1].lr < 2e-4 / 10  # the schedule has come down
    assert told[-1][0] == "recovering (seconds)"


def test_too_little_time_is_told(teacher: nn.Module, student: nn.Module) -> None:
    recovery = ilmconvert.recover(teacher, student, images(40), minutes=1e-6)
    assert same_state(recovery.model, student)
    assert "too short for a single step" in str(recovery.report)


def test_schedule_rises_and_falls() -> None:
    assert _schedule(0.0, 0.1) == pytest.approx(0.01, rel=0.02)
    assert _schedule(0.1, 0.1) == 1.0
    assert _schedule(0.55, 0.1) == pytest.approx(0.5)
    assert _schedule(1.0, 0.1) == pytest.approx(0.0, abs=1e-12)
    assert _schedule(0.0, 0.0) == 1.0


def test_features_are_compared_at_the_replaced_norms(teacher: nn.Module, student: nn.Module) -> None:
    x = images(8)
    with torch.no_grad(), FeatureMatching(teacher, student) as matching:
        teacher(x)
        student(x)
        got = matching.loss()
        seen = [m(x) for m in (teacher[:2], student[:2], teacher[:5], student[:5])]
    wanted = [((t - s) ** 2).mean() / t.var() for t, s in (seen[:2], seen[2:])]
    assert got == pytest.approx(float(sum(wanted) / 2))
    assert not any(m._forward_hooks for m in (*teacher, *student))


def test_features_need_a_norm_with_a_path() -> None:
    class Functional(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return F.group_norm(super().forward(x), 2).mean((2, 3))

    model = Functional(nn.Conv2d(3, 8, 3))
    converted = ilmconvert.convert(model, example_inputs=images(2)).model
    with pytest.raises(UsageError, match=r"found none among 1 .*; use features=0$"):
        ilmconvert.recover(model, converted, images(8), steps=1, features=0.1)


def test_records_hold_every_measurement(teacher: nn.Module, student: nn.Module) -> None:
    seen: list[Evaluation] = []
    recovery = ilmconvert.recover(teacher, student, images(40), steps=4, evaluate_every=2, on_evaluation=seen.append)
    files = records(recovery.report)
    assert tuple(seen) == recovery.report.evaluations
    lines = [json.loads(line) for line in files["recover.jsonl"].decode().splitlines()]
    assert [Evaluation.from_dict(line) for line in lines] == seen
    header, *rows = files["recover.csv"].decode().splitlines()
    assert header == "step,epoch,seconds,lr,loss,answers,agreement,top5,kl,cosine"
    assert [row.split(",")[0] for row in rows] == ["0", "2", "4"]
    assert files["recover.png"].startswith(b"\x89PNG")
    assert json.loads(files["recover.json"])["best"]["step"] == recovery.report.best.step


def test_candidates_are_compared_by_agreement_then_kl() -> None:
    def at(agreement: float, kl: float) -> Evaluation:
        return Evaluation(0, 0.0, 0.0, 0.0, None, Similarity(10, agreement, 1.0, kl, 1.0))

    ordered = [at(0.5, math.nan), at(0.5, 2.0), at(0.5, 1.0), at(0.6, 3.0)]
    assert sorted([ordered[i] for i in (2, 0, 3, 1)], key=lambda e: e.merit) == ordered


def test_a_journal_that_cannot_be_written_is_one_error(teacher: nn.Module, student: nn.Module, tmp_path: Path) -> None:
    (tmp_path / "recover.jsonl").mkdir()
    with pytest.raises(IlmconvertError, match=r"cannot write in .*: Is a directory"):
        ilmconvert.recover(teacher, student, images(60), run_folder=tmp_path, steps=1)


def test_a_broken_off_run_takes_the_same_course(teacher: nn.Module, student: nn.Module, tmp_path: Path) -> None:
    student[2].auxiliary = nn.Linear(3, 3)  # a head that the answers do not depend on gets no gradient
    short = SHORT | {"steps": 30, "evaluate_every": 10}
    whole = ilmconvert.recover(teacher, student, images(60), **short)

    class Killed(Exception):  # noqa: N818
        pass

    def kill(what: str, done: int, total: int) -> None:
        if done == 25:
            raise Killed

    with pytest.raises(Killed):
        ilmconvert.recover(teacher, student, images(60), run_folder=tmp_path, progress=kill, **short)
    again = ilmconvert.recover(teacher, student, images(60), run_folder=tmp_path, resume=True, **short)
    assert same_state(again.model, whole.model)
    a, b = ([{**e.to_dict(), "seconds": 0} for e in r.report.evaluations] for r in (again, whole))
    assert a == b
    seconds = [e.seconds for e in again.report.evaluations]
    assert seconds == sorted(seconds)  # the clock goes on too
    for wrong, message in (
        ({"lr": 1e-3}, "differs in lr"),
        ({"images": images(61)}, "differs in images"),
        ({"original": another(teacher)}, "differs in original"),
        ({"converted": another(student)}, "differs in converted"),
    ):
        given = {"original": teacher, "converted": student, "images": images(60)} | short | wrong
        with pytest.raises(CheckpointError, match=message):
            ilmconvert.recover(**given, run_folder=tmp_path, resume=True)


def test_a_run_gone_on_with_still_has_its_best_weights(teacher: nn.Module, student: nn.Module, tmp_path: Path) -> None:
    options = {"steps": 2, "batch_size": 8, "evaluate_every": 1, "lr": 300.0, "clip": 0.0, "warmup": 0.0}
    for resume in (False, True):
        recovery = ilmconvert.recover(teacher, student, images(24), run_folder=tmp_path, resume=resume, **options)
        assert [e.step for e in recovery.report.evaluations] == [0, 1, 2]
        assert recovery.report.best.step == 0
        assert same_state(recovery.model, student)


@pytest.mark.parametrize(
    ("limits", "steps"),
    [
        ({}, 100),
        ({"epochs": 1}, 10),
        ({"epochs": 0.27}, 3),
        ({"epochs": 0.001}, 1),
        ({"steps": 5, "epochs": 1}, 5),
        ({"steps": 50, "epochs": 1}, 10),
        ({"minutes": 1}, None),
    ],
)
def test_the_first_limit_ends_a_run(limits: dict[str, Any], steps: int | None) -> None:
    assert ilmconvert.RecoverOptions(batch_size=32, **limits).total_steps(320) == steps


def test_distillation_grows_with_the_square_of_the_temperature() -> None:
    """As Hinton has it: gradients then do not depend on it."""
    a, b = torch.randn(4, 10), torch.randn(4, 10)
    assert distillation(a, b, 4.0).item() == pytest.approx(16 * kl_divergence(a, b, 4.0).mean().item())


@pytest.mark.parametrize("name", ["features", "label_smoothing"])
def test_the_loss_is_linear_in_the_weight_of_a_term(teacher: nn.Module, student: nn.Module, name: str) -> None:
    labels = name == "label_smoothing"
    x = TensorDataset(images(24), torch.arange(24) % 8) if labels else images(24)

    def loss(weight: float) -> float:
        options = {"steps": 1, "batch_size": 8, "labels": labels, name: weight}
        return ilmconvert.recover(None if labels else teacher, student, x, **options).report.evaluations[1].loss

    plain = loss(0.0)
    assert abs(loss(0.2) - plain) > 1e-3
    assert loss(1.0) - plain == pytest.approx(5 * (loss(0.2) - plain), rel=1e-2)


def test_gradients_are_clipped(teacher: nn.Module, student: nn.Module) -> None:
    """To so little that even AdamW, which divides by their size, makes nothing of them."""
    for clip, moves in ((1e-14, False), (1.0, True)):
        options = {"steps": 1, "batch_size": 8, "lr": 1e-2, "warmup": 0.0, "clip": clip}
        report = ilmconvert.recover(teacher, student, images(24), **options).report
        start, last = (e.measured.kl for e in report.evaluations)
        assert (abs(last - start) > 1e-3 * start) is moves


class OneByOne(IterableDataset[Tensor]):
    """Single images, with a length and what its base class has of ``__getitem__``."""

    def __len__(self) -> int:
        return 8

    def __iter__(self) -> Iterator[Tensor]:
        return iter(images(8))


def test_wrong_requests_are_refused(teacher: nn.Module, student: nn.Module, tmp_path: Path) -> None:
    x = images(8)
    for arguments, options, message in (
        ((None, student, x), {}, "expected the original"),
        ((teacher, student, x), {"steps": 0}, "expected steps to be at least 1"),
        ((teacher, student, x), {"seed": 2**32}, r"expected seed to be at least 0 and below 2\^32, got 4294967296"),
        ((teacher, student, x), {"stepps": 3}, "expected options among"),
        ((teacher, student, x), {"labels": True}, "pairs"),
        ((teacher, student, x), {"labels": True, "features": 1.0}, "expected features=0"),
        ((teacher, student, x), {"resume": True}, "expected run_folder"),
        ((teacher, student, x[:1]), {}, "at least 2 images"),
        ((teacher, student, tmp_path / "none"), {}, "expected a folder of images"),
        ((teacher, student, 3), {}, "expected a folder, a dataset"),
        ((teacher, student, x[:, :1]), {}, r"^expected images that Sequential .*, \(1, 1, 16, 16\), ends in Runtime"),
        (
            (teacher, student, list(x)),
            {},
            r"batches \(N, 3, H, W\) of any other iterable; a batch of them, \(2, 16, 16\)",
        ),
        ((teacher, student, OneByOne()), {}, r"a batch of them, \(2, 16, 16\), ends in"),
        ((teacher, student, [x, x[..., :8]]), {}, r"of one size, got \(3, 16, 8\) and \(3, 16, 16\)$"),
        ((None, student, [(image, 1) for image in x]), {"labels": True}, "^expected an iterable of pairs of batches"),
        (
            (None, student, [(x, torch.full((8,), 9))]),
            {"labels": True},
            "from 0 to 7, for the model's 8 classes, got 9$",
        ),
        ((None, student, [(x, torch.rand(8))]), {"labels": True}, "to be integers, got torch.float32; give"),
    ):
        with pytest.raises(UsageError, match=message):
            ilmconvert.recover(*arguments, **{"steps": 1} | options)
    with pytest.raises(CheckpointError, match="expected a run to go on with"):
        ilmconvert.recover(teacher, student, x, steps=1, run_folder=tmp_path, resume=True)
    with pytest.raises(UsageError, match="fp16"):
        ilmconvert.recover(teacher, student, x, steps=1, precision="fp16", cpu=True)


def test_features_are_those_of_the_norms_though_what_follows_works_in_place() -> None:
    losses = []
    for inplace in (False, True):
        teacher = original()
        teacher[2], teacher[5] = nn.ReLU(inplace=inplace), nn.ReLU(inplace=inplace)
        student = conversion(teacher).model.eval()
        with FeatureMatching(teacher, student) as matching, torch.no_grad():
            teacher(images(8))
            student(images(8))
            losses.append(matching.loss().item())
    assert losses[0] == losses[1] > 0


def test_a_start_without_numbers_is_refused() -> None:
    teacher = original()
    student = conversion(teacher).model
    teacher[0].weight.data[0] = float("nan")
    with pytest.raises(ModelError, match=r"the original: it holds NaN or infinity in 0.weight"):
        ilmconvert.recover(teacher, student, images(), steps=1)
    with pytest.raises(UsageError, match="expected RecoverOptions, or options by keyword"):
        ilmconvert.recover(teacher, student, images(), {"steps": 1})
