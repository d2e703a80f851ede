"""Plans: decisions, adjustments, filters, and the JSON round trip."""

from __future__ import annotations

import dataclasses
import json
from collections import OrderedDict

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import ilmconvert
from ilmconvert import ConvertOptions, Plan
from ilmconvert.errors import PlanError, UsageError
from ilmconvert.nn.grouping import bottleneck
from ilmconvert.norms.build import Target
from tests.models import AuxiliaryHead, Functional, TiedNorm, small_cnn

IMAGE = torch.randn(2, 3, 8, 8)


def decide(norm: nn.Module, shape: tuple[int, ...] | None = None, **fields: object) -> ilmconvert.plan.Decision:
    inputs = None if shape is None else torch.randn(shape)
    (decision,) = ilmconvert.inspect(norm, example_inputs=inputs, **fields).plan.decisions
    return decision


@pytest.mark.parametrize(
    ("norm", "shape", "fields", "groups", "note"),
    [
        (nn.BatchNorm2d(64), (2, 64, 4, 4), {}, 1, None),
        (nn.BatchNorm2d(64), (2, 64, 4, 4), {"bn_to": "instance"}, 64, None),
        (nn.BatchNorm2d(64), (2, 64, 4, 4), {"bn_to": "group"}, 32, None),
        (nn.BatchNorm2d(64), (2, 64, 4, 4), {"bn_to": "group", "group_size": 16}, 4, None),
        (nn.BatchNorm2d(40), (2, 40, 4, 4), {"bn_to": "group"}, 40, "40 groups instead of 32"),
        (nn.BatchNorm2d(36), (2, 36, 4, 4), {"bn_to": "group", "num_groups": 8}, 9, "does not divide 36 channels"),
        (nn.BatchNorm2d(64), (2, 64, 1, 1), {"bn_to": "instance"}, 32, "a group would hold a single value"),
        (nn.BatchNorm1d(4), (3, 4), {"bn_to": "group"}, 2, "2 groups instead of 32"),
        (nn.BatchNorm1d(7), (3, 7), {"bn_to": "instance"}, 1, "1 groups instead of 7"),
        (nn.BatchNorm1d(8), None, {"bn_to": "instance"}, 4, "a group would hold a single value"),
        (nn.BatchNorm2d(8), None, {"bn_to": "instance"}, 8, None),
        (nn.GroupNorm(5, 20), (2, 20, 3), {"bn_to": "instance"}, 5, None),
        (nn.InstanceNorm2d(6), (2, 6, 3, 3), {}, 6, None),
        (nn.LayerNorm(20), (2, 20), {}, 1, None),
    ],
)
def test_groups_and_what_is_said_of_them(
    norm: nn.Module, shape: tuple[int, ...] | None, fields: dict, groups: int, note: str | None
) -> None:
    decision = decide(norm, shape, **fields)
    assert decision.target.num_groups == groups
    grouping = [n for n in decision.notes if "groups instead" in n]
    assert (note is None) == (not grouping)
    assert note is None or note in grouping[0]


def test_groups_follow_the_smallest_input_that_a_norm_sees() -> None:
    class Pyramid(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(self.norm(x).mean((2, 3), keepdim=True))

    decision = decide(Pyramid().eval(), (2, 8, 4, 4), bn_to="instance")
    assert decision.site.input_shapes == ((2, 8, 4, 4), (2, 8, 1, 1))
    assert decision.target.num_groups == 4


def test_what_does_not_run_is_noted() -> None:
    report = ilmconvert.inspect(AuxiliaryHead().eval(), example_inputs=torch.randn(2, 3, 8, 8))
    assert report.to_dict()["adjusted"] == {"aux": ["it does not run in the model's current mode"]}


def test_key_groups_and_their_adjustment() -> None:
    target = decide(nn.LayerNorm(192), (2, 192)).target
    assert (target.num_key_groups, target.hidden_features) == (12, 2)
    for reduction, width in ((4, 8), (16, 2), (1, 32)):
        assert decide(nn.LayerNorm(512), (2, 512), reduction=reduction).target.hidden_features == width
    decision = decide(nn.LayerNorm(100), (2, 100))
    assert decision.target.num_key_groups == 5
    assert decision.notes == ("key groups of 20 channels instead of 16",)


def test_a_single_value_is_skipped_with_the_reason() -> None:
    decision = decide(nn.BatchNorm1d(1), (3, 1))
    assert (decision.action, decision.code) == ("skip", "single-value")
    assert "standardizes to zero" in decision.reason


@pytest.mark.parametrize("gains", [True, False])
@pytest.mark.parametrize("norm", [nn.GroupNorm(2, 48), nn.BatchNorm2d(48, affine=False), nn.LayerNorm(48, bias=False)])
def test_added_parameters_are_counted_right(norm: nn.Module, gains: bool) -> None:
    model = nn.Sequential(norm)
    conversion = ilmconvert.convert(model, gains=gains)
    count = sum(p.numel() for p in conversion.model.parameters()) - sum(p.numel() for p in model.parameters())
    assert conversion.report.added_parameters == count > 0


@pytest.mark.parametrize(
    ("fields", "converted"),
    [
        ({"include": "blocks.1*"}, ["blocks.1.norm1", "blocks.1.norm2"]),
        ({"exclude": ("blocks.*", "norm")}, []),
        ({"norms": "layer"}, "all"),
        ({"norms": ("LayerNorm",)}, "all"),
        ({"skip_norms": "timm.layers.norm.LayerNorm"}, []),
    ],
)
def test_filters(fields: dict, converted: list[str] | str) -> None:
    report = ilmconvert.inspect(timm.create_model("test_vit", depth=2), **fields)
    every = ["blocks.0.norm1", "blocks.0.norm2", "blocks.1.norm1", "blocks.1.norm2", "norm"]
    expected = every if converted == "all" else converted
    assert [d.path for d in report.converted] == expected
    assert [d.path for d in report.skipped] == [p for p in every if p not in expected]
    assert {d.code for d in report.skipped} <= {"not-included", "excluded"}


def test_patterns_know_every_name_of_a_norm_and_upper_from_lower_case() -> None:
    for name in ("norm1", "block.1"):
        assert [d.code for d in ilmconvert.inspect(TiedNorm(), exclude=name).skipped] == ["excluded"]
    model = nn.Sequential(OrderedDict(Norm=nn.LayerNorm(8), norm=nn.LayerNorm(8)))
    assert [d.path for d in ilmconvert.inspect(model, include="Norm").converted] == ["Norm"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"include": "layer9.*"}, "expected the pattern 'layer9.*' to match the path of a norm"),
        ({"norms": "BatchNrm"}, "expected a norm of this model or a family"),
        ({"bn_to": "batch"}, "expected bn_to to be one of layer, group, instance; got 'batch'"),
        ({"num_groups": 8}, "num_groups and group_size choose the groups for bn_to='group'"),
        ({"bn_to": "group", "num_groups": 8, "group_size": 8}, "expected num_groups or group_size, got both"),
        ({"key_group_size": 0}, "expected key_group_size to be a positive integer, got 0"),
        ({"reduction": True}, "expected reduction to be a positive integer, got True"),
        ({"bn_too": "layer"}, "expected options among .*; got bn_too"),
        ({"options": ConvertOptions(), "gains": True}, "expected options or keyword fields, got both"),
        ({"exclude": ["1", 2]}, r"expected exclude to be a string or several, got \['1', 2\]"),
        ({"norms": None}, "expected norms to be a string or several, got None"),
        ({"gains": 1}, "expected gains to be True, False or None, got 1"),
        ({"options": {"gains": True}}, "expected ConvertOptions, or options by keyword .*, got dict"),
    ],
)
def test_wrong_options_are_usage_errors(fields: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ilmconvert.inspect(small_cnn(), **fields)


def test_only_plans_are_applied() -> None:
    with pytest.raises(UsageError, match=r"expected a Plan \(Plan.from_json reads one\), got str"):
        ilmconvert.apply_plan(small_cnn(), ilmconvert.inspect(small_cnn()).plan.to_json())


def test_round_trip_is_exact() -> None:
    for model in (small_cnn(), nn.GroupNorm(2, 4, eps=1), Functional(), timm.create_model("test_efficientnet")):
        plan = ilmconvert.inspect(model, bn_to="group", group_size=8, gains=True).plan
        again = Plan.from_json(plan.to_json())
        assert again == plan
        assert again.to_json() == plan.to_json()


@settings(max_examples=40, deadline=None)
@given(
    st.builds(
        Target,
        st.integers(1, 9),
        st.integers(1, 9),
        st.integers(1, 9),
        st.sampled_from(["preserve", "paper"]),
        st.booleans(),
    ),
    st.lists(st.text(max_size=20), max_size=3).map(tuple),
    st.floats(allow_nan=False, allow_infinity=False),
)
def test_round_trip_of_any_values(target: Target, notes: tuple[str, ...], eps: float) -> None:
    plan = ilmconvert.inspect(nn.GroupNorm(2, 8)).plan
    decision = plan.decisions[0]
    how = dataclasses.replace(decision.site.spec.standardization, eps=eps)
    site = dataclasses.replace(decision.site, spec=dataclasses.replace(decision.site.spec, standardization=how))
    edited = dataclasses.replace(
        plan, decisions=(dataclasses.replace(decision, site=site, target=target, notes=notes),)
    )
    assert Plan.from_json(edited.to_json()) == edited


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda d: d.update(version=9), "expected a plan of version 1, got version 9"),
        (lambda d: d.update(surprise=1), r"expected plan to have only .*; got surprise"),
        (lambda d: d["decisions"][0].update(action="delete"), r"plan.decisions\[0\].action to be one of"),
        (lambda d: d["decisions"][0]["target"].update(num_groups="2"), r"target.num_groups to be int, got '2'"),
        (lambda d: d["decisions"][0].update(target=None), "expected a target for '1'"),
        (lambda d: d["decisions"][0].pop("site"), "to be complete"),
        (lambda d: d["decisions"][0]["target"].update(hidden_features=0), "hidden_features must be at least 1"),
        (lambda d: d["decisions"][0]["site"].update(paths=[]), "a site must have a path"),
        (lambda d: d["decisions"].append(d["decisions"][0]), "one decision for each norm, got several for 1"),
        (lambda d: d["options"].update(bn_to="no"), "bn_to to be one of"),
    ],
)
def test_damaged_plans_are_refused(edit: object, message: str) -> None:
    data = json.loads(ilmconvert.inspect(small_cnn()).plan.to_json())
    edit(data)
    with pytest.raises(PlanError, match=message):
        Plan.from_json(json.dumps(data))


def test_text_that_is_no_plan() -> None:
    for text in ("{", "[]", '{"a": 1}', "null"):
        with pytest.raises(PlanError):
            Plan.from_json(text)


def test_edited_plan_is_carried_out() -> None:
    model = small_cnn()
    plan = ilmconvert.inspect(model, example_inputs=IMAGE).plan
    first, second = plan.decisions
    edited = dataclasses.replace(
        plan,
        decisions=(
            dataclasses.replace(first, action="skip", reason="by hand"),
            dataclasses.replace(second, target=Target(8, 4, 3)),
        ),
    )
    conversion = ilmconvert.apply_plan(model, Plan.from_json(edited.to_json()))
    assert isinstance(conversion.model[1], nn.BatchNorm2d)
    assert (conversion.model[4].num_groups, conversion.model[4].hidden_features) == (8, 3)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (nn.Sequential(nn.Conv2d(3, 16, 3)), "expected a module at '1'"),
        (
            nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), *small_cnn()[2:]),
            "expected torch.nn.modules.batchnorm.BatchNorm2d at '1'",
        ),
        (small_cnn(24), "the plan is for another model"),
    ],
)
def test_plan_of_another_model_is_refused(other: nn.Module, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        ilmconvert.apply_plan(other, ilmconvert.inspect(small_cnn()).plan)


def test_plan_of_a_tied_norm_is_refused_where_it_is_not_tied() -> None:
    untied = TiedNorm()
    untied.block[1] = nn.BatchNorm2d(32)
    with pytest.raises(PlanError, match=r"expected one module shared by norm1, block.1; they are not tied here"):
        ilmconvert.apply_plan(untied, ilmconvert.inspect(TiedNorm()).plan)


def test_plan_with_groups_that_do_not_divide_is_refused() -> None:
    plan = ilmconvert.inspect(nn.GroupNorm(2, 8)).plan
    wrong = dataclasses.replace(plan, decisions=(dataclasses.replace(plan.decisions[0], target=Target(3, 1, 2)),))
    with pytest.raises(PlanError, match=r"at '': ILMNorm expected num_groups to divide its 8 channels, got 3"):
        ilmconvert.apply_plan(nn.GroupNorm(2, 8), wrong)


def test_plan_that_leaves_a_norm_out_is_refused() -> None:
    plan = ilmconvert.inspect(small_cnn()).plan
    with pytest.raises(PlanError, match="the plan has none for 4"):
        ilmconvert.apply_plan(small_cnn(), dataclasses.replace(plan, decisions=plan.decisions[:1]))


def test_exactness_follows_an_edit() -> None:
    plan = ilmconvert.inspect(nn.GroupNorm(8, 16)).plan
    assert plan.decisions[0].preserves
    for target in (Target(4, 1, 2), Target(8, 1, 2, mode="paper")):
        assert not dataclasses.replace(plan.decisions[0], target=target).preserves


def test_bottleneck_of_mode_paper_follows_the_release() -> None:
    assert [bottleneck(k, mode="paper") for k in (4, 16, 32)] == [2, 1, 2]
    assert [bottleneck(k, mode="paper", grouped=False) for k in (4, 16, 32)] == [2, 2, 2]
