"""Norms that are function calls, and stay: each with its reason, and the module as it was."""

from __future__ import annotations

import copy
import random
import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import ilmconvert
from tests.models import OwnCall as Child

C = 16


def test_calls_of_one_function_on_inputs_of_different_ranks_are_refused() -> None:
    class Ranks(nn.Module):
        def forward(self, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
            return F.instance_norm(x), F.instance_norm(z, eps=1e-3)

    given = {"x": torch.randn(8, 8, 4, 4), "z": torch.randn(8, 8, 16)}
    reasons = [d.reason for d in ilmconvert.inspect(Ranks(), example_inputs=given).skipped]
    assert len(reasons) == 2
    assert all("or differs between such calls" in reason for reason in reasons)


def test_running_statistics_of_instances_are_refused() -> None:
    class Running(Child):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.zeros(C))
            self.register_buffer("var", torch.ones(C))

        def forward(self, x: Tensor) -> Tensor:
            return F.instance_norm(x, self.mean, self.var, self.w, self.b)

    (decision,) = ilmconvert.inspect(Running(), example_inputs=torch.randn(2, C, 5)).plan.decisions
    assert (decision.code, decision.reason) == (
        "functional",
        "it keeps running statistics of instances; use nn.InstanceNorm",
    )


def test_calls_in_a_graph_module_are_left_since_its_code_comes_from_its_graph() -> None:
    module = nn.Sequential(Child(), nn.LayerNorm(C), nn.Dropout()).eval()
    traced = torch.fx.symbolic_trace(module).eval()
    conversion = ilmconvert.convert(traced, example_inputs=torch.randn(3, C))
    assert [(d.norm, d.code) for d in conversion.report.skipped] == [("layer_norm", "functional")]
    assert len(conversion.report.converted) == 1
    assert not any(m.training for m in conversion.model.modules())  # deepcopy alone makes it train
    x = torch.randn(3, C)
    assert torch.equal(copy.deepcopy(conversion.model).eval()(x), traced(x))
    assert torch.equal(conversion.revert()(x), module(x))


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_norms_of_an_exported_program_are_in_the_report() -> None:
    model = nn.Sequential(nn.Conv2d(3, C, 1), nn.BatchNorm2d(C), nn.GroupNorm(4, C), nn.LayerNorm(5), nn.RMSNorm(5))
    x = torch.randn(2, 3, 6, 5)
    exported = torch.export.export(model.eval(), (x,)).module()
    report = ilmconvert.inspect(exported, example_inputs=x)
    assert [d.norm for d in report.skipped] == ["batch_norm", "group_norm", "layer_norm", "rms_norm"]
    assert report.converted == ()


class Frozen(Child):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = x * 2
        return super().forward(x)


class OverridesFrozen(Frozen):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


class Undifferentiated(Child):
    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class Counting(Child):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.register_buffer("center", torch.ones(C))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


class Averaging(Counting):
    def forward(self, x: Tensor) -> Tensor:
        self.center.mul_(0.5)
        return Child.forward(self, x) - self.center


class TwoWays(Child):
    def features(self, x: Tensor) -> Tensor:
        return self._features(x)

    def _features(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, (C,), self.w, self.b)


class Recovering(Child):
    def forward(self, x: Tensor) -> Tensor:
        try:
            x = x / 0
        except ZeroDivisionError:
            x = x * 2
        return super().forward(x)


class Own(Child):
    def __init__(self) -> None:
        super().__init__()
        self.forward = self._own  # type: ignore[method-assign]

    def _own(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, (C,), self.w, self.b)


class DropsLayers(Child):
    def forward(self, x: Tensor) -> Tensor:
        if self.training and random.random() < 0.5:
            return x
        return super().forward(x)


class DropsLayersByTorch(Child):
    def forward(self, x: Tensor) -> Tensor:
        if self.training and torch.rand(1).item() < 0.5:
            return x
        return super().forward(x)


class Checkpointed(Child):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(checkpoint(torch.sin, x, use_reentrant=False))


class ContainerDefault(Child):
    def forward(self, x: Tensor, scales: tuple[int, ...] = (1, 2)) -> Tensor:
        return super().forward(x * scales[1])


class AsksForTensor(Child):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * 2 if torch.is_tensor(x) else x)


class TakesLists(Child):
    def forward(self, x: list[Tensor] | Tensor) -> Tensor:
        return super().forward(torch.cat(x) if isinstance(x, list) else x)


class TakesMask(Child):
    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        y = super().forward(x)
        return y if mask is None else y + mask


class Calling(nn.Module):
    """Calls its child in ways of its own."""

    def __init__(self, child: nn.Module, call: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.child, self.call = child, call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.child, x)


class Borrowing(nn.Module):
    """Calls a private method of its child's, behind a branch that no trace gets past."""

    def __init__(self) -> None:
        super().__init__()
        self.child = TwoWays()

    def forward(self, x: Tensor) -> Tensor:
        return self.child._features(x) if x.sum() > 0 else self.child(x)


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (Frozen(), "with or try block"),
        (Undifferentiated(), "without gradients"),
        (Counting(), r"\(calls\)"),
        (Averaging(), "a buffer"),
        (TwoWays(), "'features'"),
        (OverridesFrozen(), "with or try block"),
        (Recovering(), "with or try block"),
        (Own(), "set on the instance"),
        (DropsLayers(), "random number"),
        (DropsLayersByTorch(), "random number"),
        (Checkpointed(), "checkpointed"),
        (ContainerDefault(), "'scales' has a container"),
        (AsksForTensor(), "does something else with what it is given"),
        (Calling(TakesLists(), lambda child, x: child([x, x])), "fails with AttributeError"),
        (Calling(TakesMask(), lambda child, x: child(x, None)), "fails with TypeError"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_forward_that_a_graph_would_not_repeat_in_full_is_left(model: nn.Module, why: str) -> None:
    conversion = ilmconvert.convert(nn.Sequential(model), example_inputs=torch.randn(3, C))
    (decision,) = conversion.report.skipped
    assert decision.code == "functional"
    assert re.search(why, decision.reason)
    assert [type(m) for m in conversion.model[0].modules()] == [type(m) for m in model.modules()]


def test_a_private_method_that_another_module_calls_counts_too() -> None:
    (decision,) = ilmconvert.inspect(Borrowing(), example_inputs=torch.randn(3, C)).skipped
    assert re.search("method '_?features'", decision.reason)


class Penalized(Child):
    def penalty(self) -> Tensor:
        return self.w.square().sum()


class PenalizedByProperty(Child):
    @property
    def penalty(self) -> Tensor:
        return self.w.square().sum()


class PenalizedInside(Child):
    def penalty(self) -> Tensor:
        return sum(self.w[i] ** 2 for i in range(C))  # type: ignore[return-value]


class Initialized(Child):
    def reset_parameters(self) -> None:
        nn.init.ones_(self.w)


@pytest.mark.parametrize(
    ("model", "stays"),
    [(Penalized(), True), (PenalizedByProperty(), True), (PenalizedInside(), True), (Initialized(), False)],
)
def test_a_norm_whose_parameters_another_method_reads_stays(model: nn.Module, stays: bool) -> None:
    conversion = ilmconvert.convert(nn.Sequential(model), example_inputs=torch.randn(3, C))
    assert [d.code for d in conversion.report.skipped] == ["parameters-read"] * stays


def test_a_plan_made_before_is_carried_out_all_the_same() -> None:
    """The refusals are decisions; and they hold whatever surrounds the conversion."""
    model, x = nn.Sequential(Undifferentiated()), torch.randn(3, C)
    with torch.no_grad():
        assert ilmconvert.convert(model, example_inputs=x).report.converted == ()
    with torch.device("cpu"), torch.inference_mode():
        plan = ilmconvert.convert(nn.Sequential(Child()), example_inputs=x).plan
    assert len(ilmconvert.apply_plan(nn.Sequential(Frozen()), plan).report.converted) == 1
