"""Norms that are function calls: converted in the module that makes the call, which stays what it was."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ilmconvert
from ilmconvert.errors import PlanError
from ilmconvert.nn import ILMNorm
from tests.helpers import relative, same_state
from tests.models import OwnCall as Child

C = 16
IMAGE, TOKENS = (2, C, 6, 5), (3, 7, C)


class Owner(nn.Module):
    """One call of ``norm`` on parameters of its own, between layers, with code that depends on the mode."""

    def __init__(self, norm: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.norm = norm
        self.gamma = nn.Parameter(torch.rand(C) + 0.5)
        self.beta = nn.Parameter(torch.randn(C))
        self.register_buffer("mean", torch.randn(C))
        self.register_buffer("var", torch.rand(C) + 0.5)
        self.after = nn.Linear(5, 5)

    def describe_yourself(self) -> str:
        """Used by others."""
        return "an owner"

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        if self.training:
            x = x + 0.5
        return self.norm(self, x) * scale


CALLS: dict[str, tuple[Callable[[nn.Module, Tensor], Tensor], tuple[int, ...], str]] = {
    "layer": (lambda m, x: F.layer_norm(x, (C,), m.gamma, m.beta, 1e-3), TOKENS, "layer"),
    "layer without parameters": (lambda m, x: F.layer_norm(x, (C,)), TOKENS, "layer"),
    "torch.layer_norm": (lambda m, x: torch.layer_norm(x, [C], m.gamma), TOKENS, "layer"),
    "group": (lambda m, x: F.group_norm(x, 4, m.gamma, m.beta), IMAGE, "group"),
    "torch.group_norm": (lambda m, x: torch.group_norm(x, 4, m.gamma, m.beta), IMAGE, "group"),
    "instance": (lambda m, x: F.instance_norm(x, weight=m.gamma, bias=m.beta), IMAGE, "instance"),
    "rms": (lambda m, x: F.rms_norm(x, (C,), m.gamma, 1e-6), TOKENS, "rms"),
    "batch": (lambda m, x: F.batch_norm(x, m.mean, m.var, m.gamma, m.beta, m.training), IMAGE, "batch"),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("inside", [False, True], ids=["root", "child"])
def test_call_becomes_a_layer_of_its_owner(call: str, inside: bool) -> None:
    norm, shape, family = CALLS[call]
    owner = Owner(norm)
    model = (nn.Sequential(nn.Identity(), owner) if inside else owner).eval()
    x = torch.randn(shape)
    before = copy.deepcopy(model)
    conversion = ilmconvert.convert(model, example_inputs=x)
    (decision,) = conversion.report.converted
    assert decision.site.family == family
    assert decision.site.input_shapes == (shape,)
    converted = conversion.model
    changed = converted[1] if inside else converted
    assert isinstance(changed, Owner)
    assert changed.describe_yourself() == "an owner"
    assert isinstance(converted.get_submodule(decision.site.layer_path), ILMNorm)
    assert conversion.report.exact is (family != "batch")
    if family != "batch":
        for mode in (True, False):  # the mode is live
            assert relative(model.train(mode)(x), converted.train(mode)(x)) < 1e-6
        assert relative(model(x), converted(x)) < 1e-6
    converted.train()(x).square().mean().backward()
    assert all(p.grad is not None for p in changed.get_submodule(decision.site.call.child).parameters())
    assert same_state(before, model)
    reverted = conversion.revert()
    assert same_state(reverted, before)
    assert type(reverted) is type(model)
    assert torch.equal(reverted.eval()(x), before(x))


def test_defaults_and_names_of_the_owners_parameters_survive() -> None:
    owner = Owner(CALLS["layer"][0]).eval()
    x = torch.randn(TOKENS)
    converted = ilmconvert.convert(owner, example_inputs=x).model
    assert torch.equal(converted(x=x, scale=1.0), converted(x))
    with pytest.raises(AssertionError, match="scale has been specialized"):  # loud, not the old norm
        converted(x, scale=2.0)


def test_owner_called_with_other_than_its_defaults_stays_and_says_so() -> None:
    (decision,) = ilmconvert.inspect(
        Owner(CALLS["layer"][0]), example_inputs={"x": torch.randn(TOKENS), "scale": 2.0}
    ).skipped
    assert decision.code == "functional"
    assert "other values than the defaults" in decision.reason


def test_saved_copied_and_pickled(tmp_path: object) -> None:
    model = nn.Sequential(Owner(CALLS["layer"][0])).eval()
    model[0].norm = use_layer_norm
    x = torch.randn(TOKENS)
    conversion = ilmconvert.convert(model, example_inputs=x)
    want = conversion.model(x)
    conversion.save(tmp_path / "saved")
    again = ilmconvert.load_conversion(tmp_path / "saved", model=copy.deepcopy(model))
    assert torch.equal(again.model(x), want)
    assert same_state(again.revert(), model)
    assert torch.equal(copy.deepcopy(conversion.model)(x), want)
    buffer = io.BytesIO()
    torch.save(conversion.model, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(x), want)
    assert torch.equal(conversion.graph_module()(x), want)


def use_layer_norm(module: nn.Module, x: Tensor) -> Tensor:
    return F.layer_norm(x, (C,), module.gamma, module.beta)


def attempt(child: nn.Module, x: Tensor) -> Tensor:
    try:
        return child(x)  # type: ignore[no-any-return]
    except RuntimeError:
        return 2 * x


class Recovers(nn.Module):
    """Goes on after an error in a child."""

    def __init__(self) -> None:
        super().__init__()
        self.child, self.gamma = nn.Linear(2 * C, C), nn.Parameter(torch.rand(C))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(attempt(self.child, x), (C,), self.gamma)


def test_call_after_an_error_is_still_the_owners() -> None:
    (decision,) = ilmconvert.inspect(Recovers(), example_inputs=torch.randn(TOKENS)).plan.decisions
    assert (decision.path, decision.site.input_shapes) == ("layer_norm_gamma", (TOKENS,))
    assert "the forward around it fails with RuntimeError" in (decision.reason or "")


class Several(nn.Module):
    """Two calls on the same parameters, two on none, and one on a convolution's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.rand(C) + 0.5)
        self.weight = nn.Parameter(torch.randn(C, C, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        weight = F.batch_norm(self.weight.reshape(1, C, -1), None, None, training=True).reshape_as(self.weight)
        x = F.group_norm(F.conv2d(x, weight), 4, self.gamma)
        x = F.group_norm(torch.relu(x), 4, self.gamma)
        return F.group_norm(torch.relu(F.group_norm(x, 2) + 1), 2)


def test_calls_on_the_same_parameters_are_one_norm() -> None:
    model, x = Several().eval(), torch.randn(IMAGE)
    conversion = ilmconvert.convert(model, example_inputs=x)
    assert len(conversion.report.converted) == 3
    assert [d.code for d in conversion.report.skipped] == ["weight-standardization"]
    assert sum(isinstance(m, ILMNorm) for m in conversion.model.modules()) == 3
    assert relative(model(x), conversion.model(x)) < 1e-6
    assert same_state(conversion.revert(), model)


class Reader(nn.Module):
    """Calls a function on the parameters of its norm module."""

    def __init__(self, eps: float = 1e-5) -> None:
        super().__init__()
        self.norm, self.eps = nn.LayerNorm(C), eps

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, (C,), self.norm.weight, self.norm.bias, self.eps)


def test_call_on_a_norm_modules_parameters_runs_the_layer_in_its_place() -> None:
    model, x = nn.Sequential(Reader()), torch.randn(TOKENS)
    conversion = ilmconvert.convert(model, example_inputs=x)
    (decision,) = conversion.report.converted
    assert (decision.path, decision.site.read_by) == ("0.norm", ("0:layer_norm_norm_weight",))
    conversion.model[0].norm.predictor.shift_decoder.weight.data.fill_(0.5)
    assert relative(model(x), conversion.model(x)) > 1e-3
    assert ilmconvert.verify(model, ilmconvert.convert(model, example_inputs=x).model, x).passed
    assert same_state(conversion.revert(), model) is True


def test_call_of_another_formula_on_a_norms_parameters_leaves_both() -> None:
    report = ilmconvert.convert(nn.Sequential(Reader(eps=0.1)), example_inputs=torch.randn(TOKENS)).report
    assert report.converted == ()
    assert report.skipped[0].code == "parameters-read"
    assert "something else" in report.skipped[0].reason


def test_plan_of_other_code_is_refused() -> None:
    plan = ilmconvert.inspect(Owner(CALLS["layer"][0]), example_inputs=torch.randn(TOKENS)).plan
    with pytest.raises(PlanError, match="expected the forward of"):
        ilmconvert.apply_plan(Owner(CALLS["rms"][0]), plan)


SHAPES: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "slice": lambda m, x: F.layer_norm(x, x.shape[-1:], m.gamma, m.beta),
    "size": lambda m, x: F.layer_norm(x, [x.size(-1)], m.gamma),
    "of the weight": lambda m, x: torch.layer_norm(x, m.gamma.shape, m.gamma),
    "rms": lambda m, x: F.rms_norm(x, (x.shape[-1],), m.gamma),
}


@pytest.mark.parametrize("how", SHAPES)
def test_normalized_shape_taken_from_the_input_is_the_weights(how: str) -> None:
    owner, x = Owner(SHAPES[how]).eval(), torch.randn(TOKENS)
    conversion = ilmconvert.convert(owner, example_inputs=x)
    (decision,) = conversion.report.converted
    assert decision.site.spec.shape == (C,)
    for mode in (True, False):
        assert relative(owner.train(mode)(x), conversion.model.train(mode)(x)) < 1e-6
    assert same_state(conversion.revert(), owner)


class Branch(nn.Module):
    """Goes one of two ways by value, where neither torch.fx nor a run on fake tensors can follow."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 1e9:
            return x
        return self.inner(x)


class BehindBranch(nn.Module):
    """Its own call stands behind a branch."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.rand(C) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return helped(x, self.gamma) if x.sum() < 1e9 else x


class StoredBehindBranch(nn.Module):
    """The function it calls there is an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = partial(F.rms_norm, normalized_shape=(C,))

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x) if x.sum() < 1e9 else x


def helped(x: Tensor, gamma: Tensor) -> Tensor:
    return F.rms_norm(x, (C,), gamma)


def test_call_in_a_child_behind_a_branch_is_converted() -> None:
    model, x = Branch(Owner(CALLS["layer"][0])).eval(), torch.randn(TOKENS)
    conversion = ilmconvert.convert(model, example_inputs=x)
    assert [d.path for d in conversion.report.converted] == ["inner:layer_norm_gamma"]
    assert conversion.report.skipped == ()
    assert relative(model(x), conversion.model(x)) < 1e-6
    assert ilmconvert.verify(model, conversion.model, x).passed


@pytest.mark.parametrize("inside", [False, True], ids=["root", "child"])
@pytest.mark.parametrize("make", [BehindBranch, StoredBehindBranch])
def test_call_that_nothing_can_follow_is_reported(make: type[nn.Module], inside: bool) -> None:
    model = Branch(make()) if inside else make()
    (decision,) = ilmconvert.inspect(model, example_inputs=torch.randn(TOKENS)).skipped
    assert decision.path == ("inner:" if inside else "") + "torch.nn.functional.rms_norm"
    assert decision.code == "functional"
    assert "torch.fx cannot follow the module that makes the call" in decision.reason


class Auxiliary(nn.Module):
    """A functional norm that training alone reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.aux = nn.LayerNorm(C), Owner(CALLS["layer"][0])

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return y + self.aux(y) if self.training else y


@pytest.mark.parametrize("training", [True, False])
def test_call_of_the_other_mode_is_found(training: bool) -> None:
    model, x = Auxiliary().train(training), torch.randn(TOKENS)
    conversion = ilmconvert.convert(model, example_inputs=x)
    assert {d.path: d.site.calls for d in conversion.report.converted} == {"norm": 1, "aux:layer_norm_gamma": training}
    assert relative(model.train()(x), conversion.model.train()(x)) < 1e-6


def test_batch_statistics_in_evaluation_too_are_no_running_ones() -> None:
    class Episodic(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gamma = nn.Parameter(torch.rand(C))
            self.register_buffer("mean", torch.rand(C))
            self.register_buffer("var", torch.rand(C))

        def forward(self, x: Tensor) -> Tensor:
            return F.batch_norm(x, self.mean, self.var, self.gamma, training=True)

    model, x = Episodic().eval(), torch.randn(16, C)
    before = copy.deepcopy(model)
    conversion = ilmconvert.convert(model, example_inputs=x)
    (layer,) = (m for m in conversion.model.modules() if isinstance(m, ILMNorm))
    assert torch.equal(layer.weight, model.gamma)
    assert not layer.predictor.scale_decoder.weight.any()
    assert "the model's function has changed: 1 norm used batch statistics" in conversion.report.warnings[0]
    assert same_state(conversion.revert(), before)


def test_mention_that_does_not_run_is_none() -> None:
    class Never(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 1

        def unused(self, x: Tensor) -> Tensor:
            return F.layer_norm(x, (C,))

    for given in (torch.randn(TOKENS), None):
        assert ilmconvert.inspect(nn.Sequential(Never(), nn.LayerNorm(C)), example_inputs=given).skipped == ()


class Holder(Child):
    def forward(self, x: Tensor) -> Tensor:
        return x * self.w + self.b


class Parent(nn.Module):
    def __init__(self, child: nn.Module) -> None:
        super().__init__()
        self.child = child


class ReadsTheChilds(Parent):
    def forward(self, x: Tensor) -> Tensor:
        return self.child(x) * self.child.w  # type: ignore[no-any-return]


class NormsWithTheChilds(Parent):
    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(self.child(x), (C,), self.child.w, self.child.b)


@pytest.mark.parametrize(
    ("model", "norms", "stays"),
    [
        (ReadsTheChilds(Child()), 1, {"child.w"}),
        (NormsWithTheChilds(Child()), 2, {"child.w", "child.b"}),
        (NormsWithTheChilds(Holder()), 1, {"child.w", "child.b"}),
    ],
    ids=["read by the parent", "used by the parent's own norm", "the holder runs too"],
)
def test_tensors_that_other_code_uses_stay_where_they_are(model: nn.Module, norms: int, stays: set[str]) -> None:
    x = torch.randn(3, C)
    conversion = ilmconvert.convert(model, example_inputs=x)
    assert len(conversion.report.converted) == norms
    assert relative(model(x), conversion.model(x)) < 1e-6
    assert {name for name in conversion.model.state_dict() if name in ("child.w", "child.b")} == stays
    assert same_state(model, conversion.revert())
    model(x).sum().backward()
    copy.deepcopy(conversion.model)(x).sum().backward()
    conversion.model(x).sum().backward()
    assert relative(model.child.w.grad, conversion.model.child.w.grad) < 1e-5


class ReadsOfAList(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Child(), Child()])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x + self.blocks[0].b


def test_a_tensor_that_is_read_of_a_list_stays_under_its_name() -> None:
    model, x = ReadsOfAList(), torch.randn(3, C)
    conversion = ilmconvert.convert(model, example_inputs=x)
    assert len(conversion.report.converted) == 2
    assert relative(model(x), conversion.model(x)) < 1e-6
