"""Calibration: what it reaches, and what it does not depend on."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import ilmconvert
from ilmconvert.calibration.fitting import Samples, fit_
from ilmconvert.errors import ModelError, UsageError
from ilmconvert.nn import ILMNorm
from tests.calibration.test_lockstep import Untraceable
from tests.helpers import relative, same_state
from tests.models import AuxiliaryHead


def trained(model: nn.Module, x: Tensor) -> nn.Module:
    """Random scales and shifts, and running statistics that fit the data."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
            module.momentum = None
    model.train()
    for _ in range(3):
        model(x)
    return model.eval()


def network(rank: int) -> nn.Module:
    """Batch Norm in one, two or three dimensions, Group Norm beside it, and Batch Norm after a linear layer."""
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1]
    norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[rank - 1]
    layers = [
        conv(3, 8, 3),
        norm(8),
        nn.ReLU(),
        conv(8, 16, 3),
        nn.GroupNorm(4, 16),
        nn.ReLU(),
        conv(16, 8, 1),
        norm(8),
    ]
    pool = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)[rank - 1](1)
    return nn.Sequential(*layers, nn.ReLU(), pool, nn.Flatten(), nn.Linear(8, 12), nn.BatchNorm1d(12), nn.Linear(12, 5))


def images(rank: int = 2, count: int = 48) -> Tensor:
    """Images that differ in brightness and contrast, as photographs do."""
    shape = (count, 3, *[12, 12, 7][:rank])
    each = (count, 1, *[1] * rank)
    return torch.randn(shape) * torch.rand(each).add(0.5) + 0.5 * torch.randn(each)


HEADS: dict[str, dict[str, object]] = {
    "layer": {},
    "group": {"bn_to": "group", "num_groups": 4},
    "instance": {"bn_to": "instance"},
    "raw variances, narrow": {"gains": True, "key_group_size": 4},
    "raw variances, group": {"gains": True, "bn_to": "group", "num_groups": 2, "key_group_size": 4, "reduction": 1},
    "no gains": {"gains": False},
}


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("head", HEADS)
def test_calibration_brings_the_models_together(head: str, rank: int) -> None:
    x, unseen = images(rank), images(rank)
    original = trained(network(rank), x)
    start = copy.deepcopy(original)
    for module in start.modules():  # statistics of another data set: the start is wrong
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean += 0.2 * torch.randn_like(module.running_mean)
            module.running_var *= torch.rand_like(module.running_var) + 0.5
    converted = ilmconvert.convert(start, example_inputs=x, **HEADS[head]).model
    report = ilmconvert.calibrate(original, converted, x.split(16), held_out=unseen.split(16)).report
    assert [site.path for site in report.sites] == ["1", "7", "12"]
    assert report.images == 48
    assert all(s.fit.explained_after >= s.fit.explained_before - 1e-9 for s in report.sites)
    limit = {"layer": 1e-5, "group": 1e-4, "instance": 1e-3}.get(head, 1.0)
    assert report.after.kl < min(limit, 0.7 * report.before.kl)
    if limit < 1:
        assert min(s.fit.explained_after for s in report.sites) > 0.999


def test_nothing_depends_on_how_the_images_are_cut_or_where_they_wait() -> None:
    x = images()
    original = trained(network(2), x)
    converted = ilmconvert.convert(original, gains=True, key_group_size=4).model.train()
    before = copy.deepcopy(converted.state_dict())
    results = [
        ilmconvert.calibrate(original, converted, batches, memory=memory)
        for batches, memory in ((x.split(48), 1 << 30), (x.split(5), 1 << 30), (iter(x.split(16)), 0))
    ]
    assert [r.report.spilled > 0 for r in results] == [False, False, True]
    reference = results[0].model.state_dict()
    for result in results[1:]:
        for name, value in result.model.state_dict().items():
            assert torch.allclose(value, reference[name], rtol=1e-4, atol=1e-4 * reference[name].abs().max()), name
    assert all(torch.equal(v, before[k]) for k, v in converted.state_dict().items())  # copies by default
    assert results[0].model.training
    assert not original.training


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.second(self.norm(self.first(x)).relu())))


@pytest.mark.parametrize("make", [Tied, Untraceable])
def test_a_layer_that_runs_twice_is_fitted_to_both(make: Callable[[], nn.Module]) -> None:
    x = images()
    original = trained(make(), x)
    start = copy.deepcopy(original)
    start.norm.running_var.mul_(1.5)
    converted = ilmconvert.convert(start, example_inputs=x).model
    report = ilmconvert.calibrate(original, converted, x.split(16)).report
    assert report.sites[0].visits == 2
    assert report.images == 48
    assert report.after.kl < 1e-4 < report.before.kl
    assert report.sites[0].fit.explained_after > 0.9999


def test_dead_channels_and_single_images_keep_a_sane_start() -> None:
    x = images()
    original = trained(network(2), x)
    original[0].weight.data[2] = 0
    original[0].bias.data[2] = 0.1  # constant channel
    original[1].weight.data[5] = 0  # constant target
    converted = ilmconvert.convert(original, gains=True, bn_to="instance").model
    for batches in (x.split(16), [x[:1]]):
        result = ilmconvert.calibrate(original, converted, batches)
        assert result.report.degenerate["1"] == (2,)
        assert all(torch.isfinite(v).all() for v in result.model.state_dict().values())
        assert result.report.after.kl < 1e-3
    assert "1 channel with an input that hardly varies kept the start, in 1" in str(result.report)


@pytest.mark.parametrize("gamma", [0.0, 1e-8, 1e-5])
def test_a_constant_target_is_fitted(gamma: float) -> None:
    torch.manual_seed(0)
    x = images()
    original = trained(network(2), x)
    with torch.no_grad():
        original[1].weight[::2] = gamma
    converted = ilmconvert.convert(original, mode="paper", example_inputs=x).model
    calibration = ilmconvert.calibrate(original, converted, x.split(16))
    assert calibration.report.degenerate == {}
    wanted, start, got = (model[:2].eval()(x)[:, ::2] for model in (original, converted, calibration.model))
    assert relative(wanted, start) > 0.5
    assert relative(wanted, got) < 1e-3


@pytest.mark.parametrize("shift", [3.0, 0.0])
def test_of_a_layer_with_nothing_but_constant_targets_the_mean_square_is_explained(shift: float) -> None:
    torch.manual_seed(0)
    layer, x, target = ILMNorm(16, 1), torch.randn(8, 16, 16, 16), shift * torch.randn(16)
    samples = Samples()
    samples.add(layer, x, target.view(1, -1, 1, 1).expand_as(x))
    fit = fit_(layer, samples)
    assert fit.degenerate == ()
    assert -2 < fit.explained_before < 0.1
    assert fit.explained_after == pytest.approx(1, abs=1e-9)
    assert torch.allclose(layer(x), target.view(1, -1, 1, 1).expand_as(x), atol=1e-4)


def test_the_fit_is_least_squares() -> None:
    """Against the same problem written out and solved by torch.linalg.lstsq."""
    torch.manual_seed(0)
    layer = ILMNorm(4, 2, num_key_groups=2, hidden_features=4, gains=True, dtype=torch.float64)
    nn.init.normal_(layer.predictor.scale_decoder.weight)
    nn.init.normal_(layer.predictor.shift_decoder.weight)
    x, target = torch.randn(10, 4, 5, dtype=torch.float64) * 2 + 1, torch.randn(10, 4, 5, dtype=torch.float64)
    samples = Samples()
    for a, b in zip(x.split(3), target.split(3), strict=True):
        samples.add(layer, a, b)
    parts = []
    for values in ((1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)):
        for parameter, value in zip(
            (layer.weight, layer.scale_gain, layer.shift_gain, layer.bias), values, strict=True
        ):
            nn.init.constant_(parameter, value)
        parts.append(layer(x).detach())
    fit = fit_(layer, samples, ridge=0.0)
    for c in range(4):
        columns = torch.stack([p[:, c].flatten() for p in parts], 1)
        expected = torch.linalg.lstsq(columns, target[:, c].flatten()[:, None]).solution.flatten()
        found = torch.stack([v[c] for v in (layer.weight, layer.scale_gain, layer.shift_gain, layer.bias)])
        assert torch.allclose(found, expected, rtol=1e-6)
    residual = (target - layer(x)).square().sum()
    spread = (target - target.mean((0, 2), keepdim=True)).square().sum()
    assert fit.explained_after == pytest.approx(1 - (residual / spread).item(), abs=1e-9)


def test_inputs_without_a_batch_dimension_are_fitted_as_batches_of_one() -> None:
    class Pooled(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).relu().mean((-2, -1)).reshape(-1, 8)

    x = images()
    original = Pooled(nn.Conv2d(3, 8, 3), nn.InstanceNorm2d(8, affine=True, track_running_stats=True, momentum=0.5))
    original.train()(x)
    converted = ilmconvert.convert(original.eval()).model
    one, many = (ilmconvert.calibrate(original, converted, batches) for batches in (x.unbind(), [x]))
    assert one.report.images == many.report.images == 48
    for name, value in many.model[1].state_dict().items():
        assert torch.allclose(one.model[1].state_dict()[name], value, rtol=1e-4, atol=1e-5), name


def test_one_clear_error() -> None:
    x = images()
    original = trained(network(2), x)
    converted = ilmconvert.convert(original).model
    with pytest.raises(UsageError, match="expected batches to calibrate with, got none"):
        ilmconvert.calibrate(original, converted, [])
    with pytest.raises(UsageError, match="expected memory of at least 0 bytes, got -1"):
        ilmconvert.calibrate(original, converted, [x], memory=-1)
    with pytest.raises(UsageError, match="layers that replaced other norms are exact already"):
        ilmconvert.calibrate(original, copy.deepcopy(original), [x])

    class Random(Tied):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if x.sum() > 0 else self.head(self.norm(self.first(x)))

    model = trained(Random(), images().abs())
    with pytest.raises(ModelError, match="Give batches that take one way through the model"):
        ilmconvert.calibrate(model, ilmconvert.convert(model, example_inputs=x).model, [x.abs(), -x.abs()])


def test_batches_take_the_models_dtype_and_idle_layers_are_told() -> None:
    model = AuxiliaryHead().double().eval()
    report = ilmconvert.calibrate(model, ilmconvert.convert(model).model, [images()]).report
    assert [site.path for site in report.sites] == ["body.1"]
    assert report.not_fitted == {"aux": "it does not run in evaluation mode"}


def test_a_hook_before_a_norm_acts_once() -> None:
    x = images()
    hooked = trained(network(2), x)
    doubled = copy.deepcopy(hooked)
    hooked[1].register_forward_pre_hook(lambda module, args: (2 * args[0],))
    for parameter in doubled[0].parameters():
        parameter.data.mul_(2)
    reports = [ilmconvert.calibrate(m, ilmconvert.convert(m, gains=False).model, [x]).report for m in (hooked, doubled)]
    assert reports[0].after.kl == pytest.approx(reports[1].after.kl, rel=1e-3)


def test_a_norm_over_several_dimensions_is_left_with_the_reason() -> None:
    original = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.LayerNorm([8, 6, 6]), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(288, 5)
    ).eval()
    x = torch.randn(24, 3, 6, 6)
    converted = ilmconvert.convert(original, mode="paper", example_inputs=x[:2]).model
    report = ilmconvert.calibrate(original, converted, x.split(8)).report
    assert [site.path for site in report.sites] == ["2"]
    assert report.not_fitted == {"1": "it has a scale for each of (8, 6, 6), and channels alone can be fitted"}


def test_report_is_plain_data() -> None:
    x = images()
    original = trained(network(2), x)
    report = ilmconvert.calibrate(original, ilmconvert.convert(original).model, [x]).report
    data = report.to_dict()
    assert data["sites"][0]["path"] == "1"
    assert data["after"]["agreement"] == 1.0
    assert data["added_parameters"] == 3 * (3 * 2) + 2 * (8 + 8 + 12) + 3 * 2 + 0 * 0
    assert not data["held_out"]
    assert "3 layers fitted to 48 images" in str(report)


def test_a_fit_that_is_further_from_the_original_is_not_kept() -> None:
    """Fitted to other inputs than it is measured on."""
    torch.manual_seed(0)
    original = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(288, 5))
    original(torch.randn(64, 3, 8, 8))
    converted = ilmconvert.convert(original.eval()).model
    strange, usual = 1e4 * torch.randn(1, 2, 3, 8, 8), torch.randn(1, 32, 3, 8, 8)
    result = ilmconvert.calibrate(original, converted, strange, held_out=usual)
    assert result.report.refused is not None
    assert result.report.refused.kl > result.report.before.kl == result.report.after.kl
    assert "the start was kept" in str(result.report)
    assert same_state(result.model, converted)


def test_batches_that_the_model_cannot_take_are_one_clear_error() -> None:
    original = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(288, 5))
    converted = ilmconvert.convert(original, gains=False).model
    with pytest.raises(UsageError, match=r"without labels .* the first, \(4, 3, 8, 8\), \(4,\), ends in TypeError"):
        ilmconvert.calibrate(original, converted, [(torch.randn(4, 3, 8, 8), torch.zeros(4))])


class InPlace(nn.Module):
    """Changes its own input, draws random numbers, and is called again from its start for each norm in it."""

    def __init__(self, inner: nn.Module, changes: bool) -> None:
        super().__init__()
        self.inner, self.head, self.changes = inner, nn.Linear(5, 5), changes

    def forward(self, x: Tensor) -> Tensor:
        x = x.add_(0.5) if self.changes else x + 0.5
        y = self.inner(x) if x.sum() < 1e9 else x  # torch.fx cannot follow it
        return self.head(y + 1e-3 * torch.rand_like(y))


def test_models_that_change_their_input_or_draw_random_numbers_are_calibrated_alike() -> None:
    torch.manual_seed(0)
    inner, x = trained(network(2), images()), images()
    plain, changing = (InPlace(inner, changes).eval() for changes in (False, True))
    changing.head = plain.head
    given = x.clone()
    reports = [
        ilmconvert.calibrate(model, ilmconvert.convert(model, gains=False).model, [given]).report
        for model in (plain, changing)
    ]
    assert torch.equal(given, x)
    assert reports[0].after.kl < 0.7 * reports[0].before.kl
    assert reports[1].before.kl == pytest.approx(reports[0].before.kl, rel=1e-4)
    assert reports[1].after.kl == pytest.approx(reports[0].after.kl, rel=1e-4)


def test_a_layer_without_shift_is_fitted_for_what_it_has() -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(8).eval()
    norm.running_mean.normal_()
    layer = ILMNorm(8, 1, bias=False)
    x = 2 + torch.randn(32, 8, 5, 5)
    samples = Samples()
    samples.add(layer, x, norm(x))
    fit = fit_(layer, samples)
    left = (norm(x) - layer(x)).square().sum()
    explained = 1 - left / (norm(x) - norm(x).mean((0, 2, 3), keepdim=True)).square().sum()
    assert fit.explained_after == pytest.approx(explained.item(), abs=1e-4)


def test_models_without_numbers_are_refused() -> None:
    model = network(2).eval()
    converted = ilmconvert.convert(model).model
    converted[0].bias.data[0] = float("inf")
    with pytest.raises(ModelError, match="expected finite activations"):
        ilmconvert.calibrate(model, converted, [images()])
    model[0].weight.data[0, 0, 0, 0] = float("nan")
    with pytest.raises(ModelError, match=r"it holds NaN or infinity in 0.weight"):
        ilmconvert.calibrate(model, converted, [images()])
