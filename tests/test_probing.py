"""verify finds what goes around an ILM layer, and leaves every bit where it was."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ilmconvert
from ilmconvert.graph import Inputs
from ilmconvert.nn import ILMNorm
from ilmconvert.probing import immovable_layers, layers_read_around
from tests.helpers import same_state
from tests.models import Bypass

X = torch.randn(4, 16)


class Mixed(nn.Module):
    """Runs ``good`` and, whatever stands in its place, computes with the weight of ``bad`` by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.good, self.bad, self.dead = ILMNorm(16), ILMNorm(16), ILMNorm(16)

    def forward(self, x: Tensor) -> Tensor:
        self.dead(x)
        self.bad(x)
        return F.layer_norm(self.good(x), (16,), self.bad.weight, self.bad.bias)


def test_probes_name_the_layers() -> None:
    model = Mixed().eval()
    layers = {name: m for name, m in model.named_modules() if isinstance(m, ILMNorm)}
    before = copy.deepcopy(model)
    assert layers_read_around(model, layers, Inputs((X,))) == ["bad"]
    assert immovable_layers(model, layers, Inputs((X,))) == ["bad", "dead"]
    assert same_state(before, model)
    assert all("forward" not in vars(m) for m in model.modules())


def checks(original: nn.Module, converted: nn.Module, x: Tensor) -> dict[str, bool | None]:
    return {c.name: c.passed for c in ilmconvert.verify(original, converted, x).checks}


def test_branch_on_the_norms_class_is_found() -> None:
    model = Bypass()
    found = checks(model, ilmconvert.convert(model, example_inputs=X).model, X)
    assert found["outputs"]  # equal, and yet not ILM
    assert not found["nothing goes around the layers"]
    assert not found["layers move the output"]


def test_code_that_training_alone_runs_is_found() -> None:
    class Regularized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = ILMNorm(16)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x) + (self.norm.weight.sum() if self.training else 0)

    model = Regularized()
    assert checks(copy.deepcopy(model), model, X)["nothing goes around the layers"] is False


def test_a_parameter_that_another_module_has_too_is_no_detour() -> None:
    model = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 16))
    model[1].bias = model[0].weight
    assert checks(model, ilmconvert.convert(model).model, X)["nothing goes around the layers"]


def test_closure_over_the_norm_is_found() -> None:
    class Closure(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            norm = self.norm = nn.LayerNorm(16)
            self.call = lambda x: norm(x)  # a copy of the model goes on calling this model's norm

        def forward(self, x: Tensor) -> Tensor:
            return self.call(x)

    model = Closure()
    result = ilmconvert.verify(model, ilmconvert.convert(model, example_inputs=X).model, X)
    assert [(c.name, c.detail) for c in result.checks if c.passed is False] == [("layers run", "bypassed: norm")]


def test_fused_kernel_that_reads_the_weights_is_found() -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2).eval()
    x = torch.randn(2, 5, 16)
    converted = ilmconvert.convert(model, example_inputs=x).model
    assert checks(model, converted, x)["nothing goes around the layers"]
    for layer in converted.layers:
        layer.activation_relu_or_gelu = 1  # torch's kernel is taken again
    found = checks(model, converted, x)
    assert found["outputs"]
    assert not found["nothing goes around the layers"]


def test_layers_behind_a_zero_scale_still_count() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.scale = nn.LayerNorm(16), nn.Parameter(torch.zeros(16))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.scale * self.norm(x)

    model = Residual()
    (check,) = (
        c
        for c in ilmconvert.verify(model, ilmconvert.convert(model, example_inputs=X).model, X).checks
        if c.name == "layers move the output"
    )
    assert check.passed
    assert check.detail == "1 of 1 can"


def test_verify_changes_nothing() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16), nn.Dropout(0.5))
    converted = ilmconvert.convert(model, example_inputs=X).model
    before, random = copy.deepcopy(converted), torch.get_rng_state()
    ilmconvert.verify(model, converted, X)
    assert same_state(before, converted)
    assert [p.requires_grad for p in before.parameters()] == [p.requires_grad for p in converted.parameters()]
    assert len(random) == len(torch.get_rng_state())


@pytest.mark.parametrize("name", ["running_mean", "running_var"])
def test_folding_code_learns_why_not(name: str) -> None:
    with pytest.raises(AttributeError, match=f"ILMNorm has no '{name}'.*revert the conversion"):
        getattr(ILMNorm(8), name)
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        _ = ILMNorm(8).nonsense
