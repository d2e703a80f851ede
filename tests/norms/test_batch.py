"""The start that running statistics give: right on average, exact where an instance has just these statistics."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import ilmconvert
from ilmconvert.norms import build_ilm, find
from ilmconvert.norms.build import Target
from tests.helpers import relative


@pytest.mark.parametrize("groups", [1, 4, 16])
@pytest.mark.parametrize("affine", [True, False])
def test_exact_for_an_instance_with_the_running_statistics(groups: int, affine: bool) -> None:
    x = torch.randn(1, 16, 8, 8, dtype=torch.float64) * torch.rand(1, 16, 1, 1) + torch.randn(1, 16, 1, 1)
    norm = nn.BatchNorm2d(16, affine=affine).double().eval()
    var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
    norm.running_mean.copy_(mean)
    norm.running_var.copy_(var)
    if affine:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    layer = build_ilm(norm, find(norm).handler, Target(groups, 1, 2))
    assert relative(norm(x), layer(x)) < 1e-12


def test_fresh_norm_starts_from_its_own_affine() -> None:
    norm = nn.BatchNorm2d(8, eps=0.0)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    layer = build_ilm(norm, find(norm).handler, Target(1, 1, 2))
    assert torch.allclose(layer.weight, norm.weight, atol=1e-6)
    assert torch.equal(layer.bias, norm.bias)


@pytest.mark.parametrize("groups", [1, 4, 16])
@pytest.mark.parametrize("blocks", [1, None])
@pytest.mark.parametrize("shape", [(6, 16, 5, 5), (6, 16, 9), (6, 16, 2, 3, 2)])
def test_predictor_undoes_the_instances_statistics(groups: int, blocks: int | None, shape: tuple[int, ...]) -> None:
    """Instances far from the running statistics: equal to the norm within the curvature that REACH leaves."""
    norm = {3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[len(shape)](16).double().eval()
    for tensor in (norm.weight, norm.bias, norm.running_mean):
        nn.init.normal_(tensor)
    nn.init.uniform_(norm.running_var, 0.5, 2.0)
    target = Target(groups, groups, 2 * groups, gains=True, standardized_keys=True, num_blocks=blocks or groups)
    layer = build_ilm(norm, find(norm).handler, target)
    each = (6, 16, *[1] * (len(shape) - 2))
    x = torch.randn(shape, dtype=torch.float64) * torch.rand(each).add(0.3).mul(2) + torch.randn(each)
    assert relative(norm(x), layer(x)) < 2e-3
    constant = torch.ones(shape, dtype=torch.float64)  # no group varies
    assert relative(norm(constant), layer(constant)) < 2e-3
    plain = build_ilm(norm, find(norm).handler, Target(groups, 1, 2))
    assert relative(norm(x), plain(x)) > 0.1


def test_without_running_statistics_the_function_changes_and_that_is_said() -> None:
    trained = nn.BatchNorm2d(8)
    trained.running_mean.fill_(0.5)
    for norm, kept in ((trained, True), (nn.BatchNorm2d(8, track_running_stats=False), False)):
        model = nn.Sequential(nn.Conv2d(3, 8, 3), norm, nn.GroupNorm(2, 8))  # the last keeps it in any case
        report = ilmconvert.inspect(model, example_inputs=torch.randn(2, 3, 8, 8))
        assert not report.exact
        assert report.to_dict()["keeps_function"] is kept
        assert bool(report.start) is kept
        assert any("the model's function has changed" in w for w in report.warnings) is not kept
        decision, _ = report.converted
        assert decision.target.standardized_keys is kept


def test_no_running_statistics_or_another_head_stay_silent() -> None:
    target = Target(4, 4, 8, gains=True, standardized_keys=True)
    for norm, other in (
        (nn.BatchNorm2d(16, track_running_stats=False), target),
        (nn.BatchNorm2d(16), Target(4, 2, 4, gains=True, standardized_keys=True)),
        (nn.BatchNorm2d(16), Target(4, 4, 4, gains=True, standardized_keys=True)),
    ):
        predictor = build_ilm(norm, find(norm).handler, other).predictor
        assert not predictor.scale_decoder.weight.any()
        assert not predictor.shift_decoder.weight.any()


def test_half_precision_holds_the_gains_of_a_dead_channel() -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(16).eval()
    norm.running_var.uniform_(20, 60)
    norm.running_var[3] = 1e-8
    x = torch.randn(2, 16, 8, 8).mul(6)
    x[:, 3] = 0
    model = nn.Sequential(norm).half()
    converted = ilmconvert.convert(model).model
    assert relative(converted(x.half()).float(), model(x.half()).float()) < 0.02


@pytest.mark.parametrize(("name", "value"), [("running_var", "inf"), ("running_var", "nan"), ("running_mean", "nan")])
def test_one_broken_statistic_does_not_spoil_other_channels(name: str, value: str) -> None:
    norm = nn.BatchNorm2d(8).eval()
    getattr(norm, name)[2] = float(value)
    x, model = torch.randn(2, 8, 4, 4), nn.Sequential(norm)
    expected, found = model(x), ilmconvert.convert(model).model(x)
    finite = expected.isfinite()
    assert torch.equal(found.isfinite(), finite)
    assert relative(found[finite], expected[finite]) < 1e-5


@pytest.mark.parametrize("bn_to", ["layer", "group"])
def test_an_instance_norm_with_running_statistics_starts_as_a_batch_norm_does(bn_to: str) -> None:
    norm = nn.InstanceNorm2d(8, affine=True, track_running_stats=True).eval()
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    x, model = torch.randn(2, 8, 6, 6), nn.Sequential(norm)
    conversion = ilmconvert.convert(model, bn_to=bn_to, num_groups=2 if bn_to == "group" else None, example_inputs=x)
    assert relative(conversion.model(x), model(x)) < 1e-3
    assert relative(conversion.model(x[0]), model(x[0])) < 1e-3
