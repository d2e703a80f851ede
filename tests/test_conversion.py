"""Converting: what comes out is still the user's model, and the original is untouched."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import timm
import torch
from torch import nn

import ilmconvert
from ilmconvert.errors import ModelError, PlanError, UsageError
from ilmconvert.nn import ILMNorm
from ilmconvert.rewrite import rewrite
from tests.helpers import all_finite, randomize_norms, relative, same_state
from tests.models import AuxiliaryHead, Branching, TiedNorm, small_cnn

IMAGE = torch.randn(2, 3, 16, 16)


def test_original_is_untouched_and_copy_shares_nothing() -> None:
    model = small_cnn()
    before = copy.deepcopy(model)
    conversion = ilmconvert.convert(model)
    with torch.no_grad():
        for parameter in conversion.model.parameters():
            parameter.add_(1)
    assert same_state(before, model)
    assert [type(m) for m in model.modules()] == [type(m) for m in before.modules()]


def test_tied_norm_stays_tied() -> None:
    model = TiedNorm()
    converted = ilmconvert.convert(model, example_inputs=IMAGE).model
    assert converted.norm1 is converted.block[1]
    assert isinstance(converted.norm1, ILMNorm)
    reverted = ilmconvert.convert(model).revert()
    assert reverted.norm1 is reverted.block[1]


def test_model_that_is_a_norm() -> None:
    model = randomize_norms(nn.GroupNorm(4, 16))
    conversion = ilmconvert.convert(model)
    x = torch.randn(2, 16, 5)
    assert isinstance(conversion.model, ILMNorm)
    assert relative(model(x), conversion.model(x)) < 1e-5
    assert same_state(model, conversion.revert())


def test_untraceable_model_converts_with_its_class() -> None:
    model = randomize_norms(Branching())
    conversion = ilmconvert.convert(model)
    x = torch.randn(3, 8)
    assert type(conversion.model) is Branching
    assert relative(model(x)["out"], conversion.model(x)["out"]) < 1e-5
    with pytest.raises(ModelError, match="expected a model that torch.fx can trace as a whole"):
        conversion.graph_module()


def test_modes_requires_grad_and_dtypes_survive() -> None:
    model = small_cnn().train()
    model[1].eval().requires_grad_(False)
    model[4].double()
    model[4].bias.requires_grad_(False)
    converted = ilmconvert.convert(model).model
    assert [m.training for m in (converted, converted[1], converted[1].predictor, converted[4])] == [
        True,
        False,
        False,
        True,
    ]
    assert not any(p.requires_grad for p in converted[1].parameters())
    assert [name for name, p in converted[4].named_parameters() if not p.requires_grad] == ["bias"]
    assert {p.dtype for p in converted[4].parameters()} == {torch.float64}


def test_affine_free_norm_takes_dtype_from_the_model() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16, elementwise_affine=False)).double()
    converted = ilmconvert.convert(model).model
    assert {p.dtype for p in converted.parameters()} == {torch.float64}
    x = torch.randn(2, 8, dtype=torch.float64)
    assert relative(model(x), converted(x)) < 1e-12


def test_hooks_on_norm_and_model_still_fire() -> None:
    model, seen = small_cnn(), []
    model.register_forward_hook(lambda *_: seen.append("model"))
    model[4].register_forward_hook(lambda *_: seen.append("norm"))
    ilmconvert.convert(model).model(IMAGE)
    assert seen == ["norm", "model"]


def test_state_dict_outside_and_inside_the_norms() -> None:
    model = randomize_norms(timm.create_model("test_vit"))
    before, after = model.state_dict(), ilmconvert.convert(model).model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())  # scale and shift keep name and value
    assert {key.split(".")[-3] for key in set(after) - set(before)} == {"predictor"}


def test_graph_module_computes_the_converted_model() -> None:
    conversion = ilmconvert.convert(timm.create_model("test_efficientnet").eval())
    graph = conversion.graph_module()
    x = torch.randn(1, 3, 160, 160)
    assert torch.equal(graph(x), conversion.model(x))
    targets = [graph.get_submodule(n.target) for n in graph.graph.nodes if n.op == "call_module"]
    assert sum(isinstance(m, ILMNorm) for m in targets) == len(conversion.report.converted)


def test_class_and_methods_of_a_timm_model_still_work() -> None:
    model = timm.create_model("test_resnet").eval()
    converted = ilmconvert.convert(model).model
    assert type(converted) is type(model)
    x = torch.randn(2, 3, 160, 160)
    features = converted.forward_features(x)
    assert features.shape == model.forward_features(x).shape
    assert torch.equal(converted.forward_head(features), converted(x))
    converted.reset_classifier(7)
    assert converted(x).shape == (2, 7)
    assert converted.get_classifier().out_features == 7
    assert model(x).shape == (2, 1000)


@pytest.mark.parametrize("bn_to", ["layer", "group", "instance"])
@pytest.mark.parametrize("mode", ["preserve", "paper"])
def test_every_target_trains(bn_to: str, mode: str) -> None:
    model = randomize_norms(small_cnn())
    converted = ilmconvert.convert(model, bn_to=bn_to, mode=mode, example_inputs=IMAGE).model.train()
    optimizer = torch.optim.SGD(converted.parameters(), lr=0.1)
    y = torch.arange(20) % 5
    x = torch.randn(20, 3, 8, 8) + 2 * torch.randn(5, 3, 1, 1)[y]
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        losses.append(nn.functional.cross_entropy(converted(x), y))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]
    assert all_finite(p.grad for p in converted.parameters())
    assert converted[1].predictor.scale_decoder.weight.abs().max() > 0


def test_progress_is_reported() -> None:
    steps: list = []
    ilmconvert.convert(small_cnn(), progress=lambda *step: steps.append(step))
    assert steps == [("converting", 1, 2), ("converting", 2, 2)]


def test_report_says_what_it_costs_and_what_changed() -> None:
    report = ilmconvert.convert(small_cnn(), example_inputs=IMAGE).report
    assert not report.exact
    assert report.added_parameters == 3 * 2 * 1 + 2 * 16 + 3 * 2 * 2
    assert report.parameters == sum(p.numel() for p in small_cnn().parameters())
    (warning,) = report.warnings
    assert "1 norm with the running statistics of an untrained network (1): load" in warning
    assert (report.untrained, report.start) == (("1",), "")
    model = small_cnn()
    model[1].running_var.fill_(2.0)
    trained = ilmconvert.convert(model, example_inputs=IMAGE).report
    assert (trained.untrained, trained.warnings) == ((), ())
    assert "1 norm with batch statistics became" in trained.start
    paper = ilmconvert.convert(small_cnn(), example_inputs=IMAGE, mode="paper").report
    assert paper.untrained == ()
    assert ilmconvert.inspect(small_cnn().to("meta"), example_inputs=IMAGE).untrained == ()
    plain = ilmconvert.convert(small_cnn(), example_inputs=IMAGE, gains=False).report
    assert "1 norm used batch statistics" in plain.warnings[0]
    assert plain.start == ""
    text = str(report)
    assert "1 x BatchNorm2d -> ILM layer (1 group)" in text
    assert "1 x GroupNorm -> ILM group (4 groups)" in text
    assert "input size" in str(ilmconvert.convert(small_cnn()).report)  # groups were not checked, and it is said


def test_tied_parameters_stay_tied() -> None:
    model = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.LayerNorm(8))
    model[2].weight = model[0].weight
    model[1].bias = model[0].bias
    conversion = ilmconvert.convert(model)
    converted = conversion.model
    assert converted[0].weight is converted[2].weight
    assert converted[0].bias is converted[1].bias
    assert converted[0].weight is not model[0].weight
    reverted = conversion.revert()
    assert reverted[0].weight is reverted[2].weight
    assert same_state(model, reverted)
    paper = ilmconvert.convert(model, mode="paper").model  # which starts its scale elsewhere, once for each layer
    assert all(torch.equal(paper[i].weight, model[i].weight + 0.5) for i in (0, 2))


def test_model_whose_deepcopy_copies_nothing_is_refused() -> None:
    class Stubborn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(4)

        def __deepcopy__(self, memo: dict) -> Stubborn:
            return self

    model = nn.Sequential(Stubborn())
    with pytest.raises(ModelError, match="returns the model's own LayerNorm, Stubborn"):
        ilmconvert.convert(model)
    assert isinstance(model[0].norm, nn.LayerNorm)


@pytest.mark.parametrize(("activation", "kernel"), [("relu", 1), ("gelu", 2)])
def test_transformer_encoder_layer_does_not_go_around_its_norms(activation: str, kernel: int) -> None:
    """torch's fused inference kernel reads the norms' weights: off for ILM layers, and on again after revert."""
    layer = nn.TransformerEncoderLayer(16, 2, 32, activation=activation, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    conversion = ilmconvert.convert(model, example_inputs=torch.randn(2, 5, 16))
    for parameter in conversion.model.layers[0].norm1.predictor.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        inference = conversion.model(x)
    assert relative(conversion.model(x.requires_grad_()), inference) < 1e-5
    assert [layer.activation_relu_or_gelu for layer in conversion.revert().layers] == [kernel, kernel]


def test_users_hooks_do_not_see_fake_tensors() -> None:
    seen = []
    model = small_cnn()
    model[1].register_forward_hook(lambda module, args, output: seen.append(output))
    model[1].register_forward_pre_hook(lambda module, args: seen.append(args))
    converted = ilmconvert.convert(model, example_inputs=IMAGE)
    assert seen == []
    converted.model[1].register_forward_hook(lambda *_: seen.append("new"))
    converted.revert()(IMAGE)
    assert len(seen) == 2
    assert "new" not in seen


MADE: dict[str, Callable[[ilmconvert.Conversion, nn.Module, Path], nn.Module]] = {
    "convert": lambda conversion, model, folder: ilmconvert.convert(model).model,
    "revert": lambda conversion, model, folder: conversion.revert(),
    "load": lambda conversion, model, folder: ilmconvert.load(conversion.save(folder / "saved"), model=model),
    "calibrate": lambda conversion, model, folder: ilmconvert.calibrate(model, conversion.model, [IMAGE]).model,
}


@pytest.mark.parametrize("how", MADE)
def test_what_is_made_under_inference_mode_can_be_trained(how: str, tmp_path: Path) -> None:
    model = small_cnn().eval()
    conversion = ilmconvert.convert(model, gains=False)
    with torch.inference_mode():
        made = MADE[how](conversion, model, tmp_path)
    made.train()(IMAGE).square().sum().backward()
    assert all(parameter.grad is not None for parameter in made.parameters())


def test_wrong_argument_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="expected a torch.nn.Module, got 'resnet18'; build it first"):
        ilmconvert.convert("resnet18")


def test_torchscript_is_a_clear_error() -> None:
    with pytest.warns(FutureWarning):
        scripted = torch.jit.script(nn.Sequential(nn.LayerNorm(4)))
    with pytest.raises(ModelError, match="expected Python modules, got TorchScript"):
        ilmconvert.convert(scripted)


@pytest.mark.parametrize("given", [IMAGE, None], ids=["run", "traced alone"])
def test_idle_norms_are_told(given: torch.Tensor | None) -> None:
    report = ilmconvert.convert(AuxiliaryHead().eval(), example_inputs=given).report
    assert "1 norm did not run in the model's current mode: aux" in str(report)


def test_in_place_gives_what_a_copy_gives_and_shares_every_other_weight() -> None:
    model = randomize_norms(timm.create_model("test_efficientnet")).eval()
    expected = ilmconvert.convert(model)
    reverted = model.state_dict()
    reverted = {name: value.clone() for name, value in reverted.items()}
    convs = {name: p.data_ptr() for name, p in model.named_parameters() if "conv" in name}
    conversion = ilmconvert.convert_(model)
    assert conversion.model is model
    assert same_state(model, expected.model)
    assert {name: p.data_ptr() for name, p in model.named_parameters() if name in convs} == convs
    assert all(torch.equal(v, reverted[k]) for k, v in conversion.revert().state_dict().items())
    with pytest.raises(UsageError, match="expected a model with norms in it, got a LayerNorm"):
        ilmconvert.convert_(nn.LayerNorm(4))


def test_an_error_leaves_the_model_as_it_was() -> None:
    model = small_cnn()
    before = copy.deepcopy(model)
    plan = ilmconvert.inspect(model, example_inputs=IMAGE).plan
    with (
        mock.patch("ilmconvert.rewrite.build_ilm", side_effect=[nn.Identity(), ValueError("no")]),
        pytest.raises(PlanError, match="no"),
    ):
        rewrite(model, plan, in_place=True)
    assert same_state(model, before)
    assert [type(m) for m in model.modules()] == [type(m) for m in before.modules()]


def test_what_is_no_number_or_no_norm_is_said() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    model[1].running_var[2] = float("nan")
    conversion = ilmconvert.convert(model)
    assert conversion.report.not_finite == ("1",)
    assert any("1 norm with NaN or infinity (1)" in warning for warning in conversion.report.warnings)
    assert "the model has no norm to convert" in ilmconvert.convert(conversion.model).report.warnings
    assert "no norm was converted" in ilmconvert.convert(model, norms="layer").report.warnings
    assert repr(conversion) == "<Conversion of Sequential: 1 norm converted, 0 skipped>"


def test_a_compiled_model_is_refused() -> None:
    with pytest.raises(ModelError, match="not compiled yet"):
        ilmconvert.convert(torch.compile(small_cnn()))
