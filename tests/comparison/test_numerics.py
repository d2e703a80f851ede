"""Activations compared: figures by hand, streaming, what cannot be compared."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import ilmconvert
from ilmconvert.comparison import GraphDiff, Numbers
from ilmconvert.comparison.batches import Batches, folder_batches, random_batches
from ilmconvert.comparison.numerics import measure
from ilmconvert.errors import IlmconvertError, UsageError
from ilmconvert.graph import Inputs
from tests.comparison.models import Small


def numbers(diff: GraphDiff) -> dict[str, Numbers | None]:
    return {row.path: row.numbers for row in diff.rows}


def pair() -> tuple[Small, Small]:
    torch.manual_seed(0)
    a = Small()
    b = copy.deepcopy(a)
    with torch.no_grad():
        b.blocks[1].conv.weight.mul_(-1)
    return a.eval(), b.eval()


def test_the_place_where_two_models_part_is_seen() -> None:
    a, b = pair()
    x = torch.randn(2, 3, 8, 8)
    found = numbers(ilmconvert.diff(a, b, numerics=x))
    for path in ("stem", "stem.2", "blocks.0", "blocks.0.norm"):
        assert found[path] == Numbers(0.0, pytest.approx(1.0))
    assert found["blocks.1.conv"].relative_error > 0.1
    assert found[""].relative_error > 0
    before, after = (model.blocks(model.stem(x)).mean((2, 3)) for model in (a, b))  # a function call
    assert found[":mean"].relative_error == pytest.approx(((before - after).norm() / before.norm()).item(), rel=1e-5)
    assert found["blocks.0:add"] == Numbers(0.0, pytest.approx(1.0))


def test_figures_are_those_of_the_definition() -> None:
    a, b = pair()
    x = torch.randn(3, 3, 8, 8)
    outputs: list[Tensor] = []
    for model in (a, b):
        model.blocks[1].norm.register_forward_hook(lambda m, i, o: outputs.append(o.detach().double()))
        model(x)
    before, after = outputs
    cosine = torch.nn.functional.cosine_similarity(before.flatten(), after.flatten(), dim=0).item()
    for first, models in ((before, (a, b)), (after, (b, a))):  # relative to the first, in evaluation mode
        got = numbers(ilmconvert.diff(*(model.train() for model in models), numerics=x))["blocks.1.norm"]
        assert got.relative_error == pytest.approx(((before - after).norm() / first.norm()).item(), rel=1e-6)
        assert got.cosine == pytest.approx(cosine, rel=1e-6)


@pytest.mark.parametrize("budget", [1, 3000, 10**9])
def test_batches_and_budget_do_not_matter(budget: int) -> None:
    a, b = pair()
    x = torch.randn(6, 3, 8, 8)
    base = ilmconvert.diff(a, b)
    whole = ilmconvert.diff(a, b, numerics=x)
    split = measure(base, a, b, Batches([Inputs((part,)) for part in x.split(4)], lambda: "two batches"), budget=budget)
    assert split.numerics.samples == 6
    for path, expected in numbers(whole).items():
        if expected is not None:
            got = numbers(split)[path]
            assert got.relative_error == pytest.approx(expected.relative_error, rel=1e-5, abs=1e-9)
            assert got.cosine == pytest.approx(expected.cosine, rel=1e-6)


def test_no_more_than_the_budget_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    from ilmconvert.comparison import numerics

    largest = 0
    keep = numerics._Pass.keep

    def watched(self: numerics._Pass, index: int, tensors: list[Tensor]) -> None:
        nonlocal largest
        keep(self, index, tensors)
        largest = max(largest, sum(t.nbytes for calls in self.held.values() for call in calls for t in call))

    monkeypatch.setattr(numerics._Pass, "keep", watched)
    a, b = pair()
    one = 4 * 2 * 8 * 64
    measure(ilmconvert.diff(a, b), a, b, Batches([Inputs((torch.randn(2, 3, 8, 8),))], lambda: "x"), budget=3 * one)
    assert 2 * one < largest <= 3 * one


def test_many_random_samples_take_as_many_runs_each_as_few() -> None:
    a, b = pair()
    runs = 0

    def count(*_: object) -> None:
        nonlocal runs
        runs += 1

    def measured(samples: int) -> tuple[int, list[tuple[str, int, int]]]:
        nonlocal runs
        told: list[tuple[str, int, int]] = []
        batches = random_batches(a, samples=samples, input_size=(3, 8, 8))
        runs = 0
        found = measure(base, a, b, batches, budget=3 * 4 * 8 * 64 * 4, progress=lambda *args: told.append(args))
        assert found.numerics.samples == samples
        return runs, told

    base = ilmconvert.diff(a, b)
    a.stem.register_forward_hook(count)
    few, told = measured(4)
    assert few > 1
    assert told == [("comparing activations", 0, 1)]
    many, told = measured(20)
    assert many == 5 * few
    assert told[-1] == ("comparing activations", 4, 5)
    x, y = (batch.args[0] for batch in list(random_batches(a, samples=8, input_size=(3, 8, 8)).batches))
    assert not torch.equal(x, y)


def test_any_number_of_arguments() -> None:
    class Cat(nn.Module):
        def forward(self, *xs: Tensor, **more: Tensor) -> Tensor:
            return torch.cat([*xs, *more.values()], 1)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cat, self.norm = Cat(), nn.LayerNorm(8)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.cat(x, -x, y=x)[:, :8]) if x.sum() < 1e9 else x

    for model, inputs in ((Net(), torch.randn(2, 4)), (Cat(), (torch.randn(2, 4), torch.randn(2, 3)))):
        found = numbers(ilmconvert.diff(model, model, numerics=[inputs]))
        assert found[""] == Numbers(0.0, pytest.approx(1.0))


def test_changes_in_place_do_not_reach_what_was_kept() -> None:
    def model() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 4))

    a, b = model(), model()
    b[1] = nn.ReLU()
    found = numbers(ilmconvert.diff(a, b, numerics=torch.randn(8, 4)))
    assert all(n == Numbers(0.0, pytest.approx(1.0)) for n in found.values())


def test_what_cannot_be_compared_says_why() -> None:
    torch.manual_seed(0)
    a = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))
    b = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3))
    found = numbers(ilmconvert.diff(a, b, numerics=torch.randn(2, 4)))
    assert found["0"] == Numbers(None, None, "shapes (2, 6) and (2, 5)")
    assert found["1"].relative_error > 0

    class Zero(nn.Module):
        def __init__(self, value: float) -> None:
            super().__init__()
            self.inner, self.unused = nn.Identity(), nn.Identity()
            self._value = value

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x * self._value)

    x = torch.ones(2, 3)
    found = numbers(ilmconvert.diff(Zero(0), Zero(1), numerics=x))
    assert found["inner"] == Numbers(None, None, "the first is zero")
    assert found["unused"] == Numbers(None, None, "did not run")
    assert numbers(ilmconvert.diff(Zero(0), Zero(0), numerics=x))["inner"] == Numbers(0.0, None)
    assert numbers(ilmconvert.diff(Zero(1), Zero(float("nan")), numerics=x))["inner"].note == "not finite"


def test_a_conversion_that_preserves_stays_equal_all_the_way() -> None:
    import timm

    conversion = ilmconvert.convert(timm.create_model("test_vit"))
    diff = conversion.diff(numerics="random")
    errors = [row.numbers.relative_error for row in diff.rows if row.numbers and row.numbers.relative_error is not None]
    assert len(errors) > 60
    assert max(errors) < 1e-5
    assert diff.numerics.inputs == "4 random inputs of 3x160x160"


def test_a_folder_of_images(tmp_path: Path) -> None:
    import timm

    model = timm.create_model("test_resnet")
    for i in range(3):
        Image.new("RGB", (50, 60), (80 * i, 10, 200)).save(tmp_path / f"{i}.png")
    (tmp_path / "broken.jpg").write_bytes(b"nothing")
    diff = ilmconvert.diff(model, model, numerics=tmp_path)
    assert diff.numerics.samples == 3
    assert "broken.jpg" in diff.numerics.notes[0]
    assert diff.rows[0].numbers.relative_error == 0
    (tmp_path / "only").mkdir()
    (tmp_path / "only" / "broken.jpg").write_bytes(b"nothing")
    with pytest.raises(UsageError, match=r"none of 1 files can; the first is .*broken.jpg'"):
        ilmconvert.diff(model, model, numerics=folder_batches(tmp_path / "only", model))


def test_inputs_that_do_not_fit_are_refused() -> None:
    a, b = pair()
    with pytest.raises(IlmconvertError, match="small cannot be run on these inputs: .*--input-size"):
        ilmconvert.diff(a, b, numerics=torch.randn(2, 4, 8, 8), names=("small", "other"))
    with pytest.raises(UsageError, match="declares none; give --input-size"):
        ilmconvert.diff(a, b, numerics="random")
    with pytest.raises(UsageError, match="expected numerics to be 'random'"):
        ilmconvert.diff(a, b, numerics=3)
