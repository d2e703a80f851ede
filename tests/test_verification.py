"""Verifying: what it sees of a conversion, and what it does not let pass."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import ilmconvert
from ilmconvert.errors import UsageError
from ilmconvert.verification import relative_difference
from tests.helpers import randomize_norms, same_state
from tests.models import Bypass, small_cnn

IMAGE = torch.randn(2, 3, 16, 16)


def test_sees_an_exact_conversion() -> None:
    model = randomize_norms(timm.create_model("test_vit"))
    result = ilmconvert.verify(model, ilmconvert.convert(model).model)
    assert result.passed
    assert result.relative_difference < 1e-5
    assert all(c.passed is not False for c in result.checks)


def test_tells_what_changed_with_batch_norm() -> None:
    model = timm.create_model("test_resnet")
    result = ilmconvert.verify(model, ilmconvert.convert(model).model)
    assert result.passed
    assert {c.name: c.passed for c in result.checks}["outputs"] is None
    assert 1e-6 < result.relative_difference < 1e-3
    plain = ilmconvert.verify(model, ilmconvert.convert(model, gains=False).model)
    assert plain.relative_difference > 1e-2


def checks(model: nn.Module, converted: nn.Module, inputs: object) -> dict:
    return {c.name: c for c in ilmconvert.verify(model, converted, inputs).checks}


def test_detects_a_bypassed_layer() -> None:
    model = Bypass()
    found = checks(model, ilmconvert.convert(model).model, torch.randn(2, 16))
    assert found["layers run"].passed is False
    assert "bypassed: norm" in found["layers run"].detail


def test_detects_damage() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 4))
    x = torch.randn(3, 8)

    def damaged(damage: object) -> nn.Module:
        converted = ilmconvert.convert(model).model
        damage(converted)
        return converted

    assert checks(model, damaged(lambda m: nn.init.ones_(m[1].bias)), x)["outputs"].passed is False
    assert checks(model, damaged(lambda m: m[1].bias.data.add_(1e-3)), x)["outputs"].passed is False
    assert ilmconvert.verify(model, copy.deepcopy(model), x, tolerance=0.0).passed
    assert (
        checks(model, damaged(lambda m: nn.init.constant_(m[1].bias, float("nan"))), x)["training, as given"].passed
        is False
    )
    assert checks(model, damaged(lambda m: m[1].eval()), x)["training flags"].passed is False
    assert checks(model, damaged(lambda m: m.append(nn.Linear(4, 2))), x)["output shapes"].passed is False


def test_one_sample_is_cut_of_what_is_as_long_as_the_batch() -> None:
    class Lookup(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.head = nn.LayerNorm(8), nn.Linear(6, 2)

        def forward(self, x: Tensor, table: Tensor) -> Tensor:
            return self.head(self.norm(x) @ table.T)

    model, inputs = Lookup(), (torch.randn(4, 8), torch.randn(6, 8))
    found = checks(model, ilmconvert.convert(model, example_inputs=inputs).model, inputs)
    assert found["training, one sample"].passed is True


def test_leaves_both_models_alone() -> None:
    model = small_cnn().train()
    converted = ilmconvert.convert(model).model
    states = [copy.deepcopy(m) for m in (model, converted)]
    ilmconvert.verify(model, converted, IMAGE)
    assert same_state(states[0], model)
    assert same_state(states[1], converted)
    assert all(m.training for m in (*model.modules(), *converted.modules()))
    assert all(p.grad is None for p in converted.parameters())


def test_compares_something() -> None:
    class Wrapped(nn.Sequential):
        def forward(self, x: torch.Tensor) -> object:
            return type("Result", (), {"value": super().forward(x)})()

    found = checks(Wrapped(nn.LayerNorm(4)), Wrapped(nn.LayerNorm(4)), torch.randn(2, 4))
    assert found["output shapes"].passed is False


def test_takes_equal_infinities_as_equal() -> None:
    class Masked(nn.Sequential):
        def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return super().forward(x).masked_fill(mask, -torch.inf)

    model = Masked(nn.LayerNorm(4))
    inputs = (torch.randn(2, 4), torch.tensor([True, False, False, True]))
    found = checks(model, ilmconvert.convert(model, example_inputs=inputs).model, inputs)
    assert found["outputs"].passed
    assert relative_difference([torch.ones(1)], []) == float("inf")
    assert relative_difference([torch.tensor([torch.nan, 1.0])], [torch.tensor([1.0, torch.nan])]) == float("inf")


def test_nothing_is_said_of_outputs_that_are_not_finite() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8))
    nn.init.constant_(model[0].weight, float("nan"))
    result = ilmconvert.verify(model, ilmconvert.convert(model).model, torch.randn(2, 4))
    assert not result.passed
    assert next(c for c in result.checks if c.name == "outputs").passed is False
    assert math.isnan(result.relative_difference)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_gradients_are_checked_where_none_are_taken(mode: Callable[[], AbstractContextManager[None]]) -> None:
    model = small_cnn()
    converted = ilmconvert.convert(model).model
    count = len(list(converted.parameters()))
    with mode():
        found = checks(model, converted, torch.randn(2, 3, 16, 16))
    assert found["training, as given"].detail == f"gradients of {count} parameters finite"
    assert all(check.passed is not False for check in found.values())


def test_a_conversion_without_gradients_is_told() -> None:
    class Deaf(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).detach()

    model, deaf = (kind(nn.Linear(8, 8), nn.LayerNorm(8)) for kind in (nn.Sequential, Deaf))
    x, told = torch.randn(3, 8), "RuntimeError: no gradient reaches a parameter"
    for original, passed, detail in ((model, False, told), (deaf, None, f"the original fails too: {told}")):
        check = checks(original, deaf, x)["training, as given"]
        assert (check.passed, check.detail) == (passed, detail)


class Checkpointed(nn.Module):
    """Its norm runs in a reentrant checkpoint, which knows no ``autograd.grad``."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return checkpoint(self.norm, y, use_reentrant=True) if self.training else self.norm(y)  # type: ignore[no-any-return]


def test_reentrant_checkpoints() -> None:
    model, x = Checkpointed(), torch.randn(3, 8)
    found = checks(model, ilmconvert.convert(model).model, x)
    assert found["layers move the output"].detail == "1 of 1 can"
    assert all(check.passed is not False for check in found.values())


def test_what_the_original_cannot_do_is_no_failure_of_the_conversion() -> None:
    model, x = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.LayerNorm(8)), torch.randn(3, 8)
    converted = ilmconvert.convert(model, exclude="1").model
    assert ilmconvert.verify(model, converted, x).passed
    alone = checks(model, converted, x)["training, one sample"]
    assert (alone.passed, alone.detail[:40]) == (None, "the original fails too: ValueError: Expe")
    converted[2].register_forward_pre_hook(lambda module, args: 1 / 0 if module.training else None)
    assert checks(model, converted, x)["training, as given"].passed is False


@pytest.mark.parametrize(
    ("give", "message"),
    [
        (lambda model: ilmconvert.convert(model), "expected a torch.nn.Module, got Conversion; give its model"),
        (lambda model: "resnet18", "expected a torch.nn.Module, got str$"),
        (lambda model: copy.deepcopy(model).to("meta"), "expected a Sequential with values to compare"),
    ],
)
def test_what_is_no_model_with_values_is_refused(give: Callable[[nn.Module], object], message: str) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
    with pytest.raises(UsageError, match=message):
        ilmconvert.verify(model, give(model), torch.randn(2, 8))


class Noisy(nn.Module):
    """Changes its input in place, and draws random numbers in evaluation too."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x.div_(2)))
        return x + torch.rand_like(x)


def test_models_that_change_their_input_or_draw_random_numbers() -> None:
    model, x = Noisy(), torch.randn(2, 3, 16, 16)
    before = x.clone()
    result = ilmconvert.verify(model, ilmconvert.convert(model, example_inputs=x).model, x)
    assert result.passed
    assert result.relative_difference < 1e-6
    assert torch.equal(x, before)


def test_complex_outputs_are_compared_whole() -> None:
    assert relative_difference([torch.tensor([3.0 + 4.0j])], [torch.tensor([3.0 - 1.0j])]) == pytest.approx(1.0)
    assert relative_difference([torch.tensor([3.0 + 4.0j])], [torch.tensor([5.0])]) == float("inf")
