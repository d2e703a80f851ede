"""Finding: every norm, by whatever means it takes, without touching the caller's model."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import nn
from torch.nn.utils import prune

import ilmconvert
from ilmconvert.errors import ModelError, UsageError
from ilmconvert.graph import example_inputs, find_sites
from tests.helpers import same_state
from tests.models import AuxiliaryHead, Branching, Caching, Failing, Functional, TiedNorm

IMAGE = torch.randn(2, 3, 16, 16)


def sites(model: nn.Module, given: object = None) -> dict:
    return {site.path: site for site in find_sites(model, example_inputs(model, given)).sites}


def test_site_tells_everything_about_a_norm() -> None:
    model = timm.create_model("test_efficientnet").eval()
    site = sites(model)["blocks.0.0.bn1"]
    assert (site.class_name, site.family, site.spec.num_channels, site.spec.standardization.eps) == (
        "BatchNormAct2d",
        "batch",
        16,
        1e-5,
    )
    assert (site.found, site.calls, site.training, site.parameters) == ("graph", 1, False, 32)
    assert site.input_shapes == ((2, 16, 80, 80),)
    assert site.spec.has_act
    assert site.spec.num_groups is None


def test_tied_norm_is_one_site_with_both_names() -> None:
    found = sites(TiedNorm(), IMAGE)
    assert list(found) == ["norm1"]
    assert found["norm1"].paths == ("norm1", "block.1")
    assert found["norm1"].calls == 2


def test_untraceable_model_is_found_piece_by_piece() -> None:
    search = find_sites(Branching())
    assert "" in search.untraced
    assert "control flow" in search.untraced[""] or search.untraced[""]
    assert {s.path: s.found for s in search.sites} == {
        "stem.1": "inside stem",
        "heads.a.1": "inside heads.a",
        "heads.b": "inside heads.b",
    }


def test_leaf_modules_are_descended_into() -> None:
    found = sites(timm.create_model("mobilevit_xxs").eval())
    inside = [s for s in found.values() if s.found.startswith("inside")]
    assert sum(s.class_name == "LayerNorm" for s in inside) == 21  # all of its transformer blocks
    assert sum(s.class_name == "BatchNormAct2d" for s in inside) == 9
    assert all(s.calls == 1 and s.input_shapes for s in found.values())


def test_norm_of_the_other_mode_is_found_and_said() -> None:
    for mode, calls in ((True, 1), (False, 0)):
        site = sites(AuxiliaryHead().train(mode), IMAGE)["aux"]
        assert site.calls == calls
        assert site.found == ("graph" if mode else "graph (other mode)")


def test_functional_norms_are_told_apart() -> None:
    codes = {s.norm: s.refusal.code for s in find_sites(Functional()).sites if s.refusal}
    assert codes == {
        "torch.nn.functional.batch_norm": "weight-standardization",
        "torch.nn.functional.layer_norm": "functional",
    }


def test_weight_standardization_is_never_a_norm_to_convert() -> None:
    search = find_sites(timm.create_model("resnetv2_50x1_bit"))
    standardized = [s for s in search.sites if s.refusal]
    assert {s.refusal.code for s in standardized} == {"weight-standardization"}
    assert len(standardized) == 53
    assert sum(s.class_name == "GroupNormAct" for s in search.sites) == 49


def test_execution_order_comes_from_the_run() -> None:
    class Reversed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last, self.first = nn.LayerNorm(8), nn.LayerNorm(8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(self.first(x))

    assert list(sites(Reversed(), torch.randn(2, 8))) == ["first", "last"]


@pytest.mark.parametrize("make", [TiedNorm, Branching, AuxiliaryHead, Functional, Caching, Failing])
def test_the_callers_model_is_never_changed(make: type[nn.Module]) -> None:
    model = make()
    next(iter(model.children())).eval()  # mixed modes
    model.register_buffer("counter", torch.zeros(()))
    before, flags = copy.deepcopy(model), [m.training for m in model.modules()]
    state = dict(vars(model))
    search = find_sites(model, example_inputs(model, torch.randn(2, 3, 16, 16)))
    assert same_state(before, model)
    assert [m.training for m in model.modules()] == flags
    assert vars(model) == state
    if make is Failing:
        assert "no forward today" in search.run_error
        assert [s.found for s in search.sites] == ["inside norm"]


@pytest.mark.parametrize(("affine", "name"), [(True, "weight"), (False, "running_mean")])
def test_lazy_norm_is_a_clear_error(affine: bool, name: str) -> None:
    with pytest.raises(ModelError, match=rf"'1\.{name}' \(a lazy module\).*run one forward pass"):
        find_sites(nn.Sequential(nn.Conv2d(3, 8, 1), nn.LazyBatchNorm2d(affine=affine)))


def test_model_that_cannot_be_copied_is_a_clear_error() -> None:
    model = nn.Sequential(nn.LayerNorm(4))
    model.stream = (i for i in range(3))
    with pytest.raises(ModelError, match="expected a model that copy.deepcopy can copy, got Sequential"):
        find_sites(model)


def test_computed_attributes_do_not_stop_the_copy() -> None:
    model = nn.Sequential(nn.LayerNorm(4))
    model.scale = model[0].weight * 2
    assert [s.path for s in find_sites(model).sites] == ["0"]


def test_example_inputs_of_another_kind_are_refused() -> None:
    with pytest.raises(UsageError, match="got str"):
        example_inputs(nn.Linear(2, 2), "3,224,224")


def test_keyword_inputs() -> None:
    assert sites(nn.LayerNorm(4), {"input": torch.randn(3, 4)})[""].input_shapes == ((3, 4),)


class Untraced(nn.Module):
    """A functional norm in a module that torch.fx cannot follow, and norms that torch does not know of."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.hidden = [nn.LayerNorm(8), nn.Sequential(nn.GroupNorm(2, 8))]
        self.named = {"a": nn.BatchNorm1d(8)}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if bool((x.shape[0] > 0) and x.is_contiguous()):
            x = torch.nn.functional.layer_norm(x, (8,))
        for norm in self.hidden:
            x = norm(x)
        return self.norm(x)


def test_functional_norms_of_untraceable_modules_are_seen_in_the_run() -> None:
    codes = {path: site.refusal.code for path, site in sites(Untraced(), torch.randn(2, 8)).items() if site.refusal}
    assert codes["torch.nn.functional.layer_norm"] == "functional"
    hidden = {path for path, code in codes.items() if code == "unregistered"}
    assert hidden == {"hidden[0]", "hidden[1].0", "named['a']"}


def test_timm_functions_are_seen_through() -> None:
    class Fast(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return timm.layers.fast_norm.fast_layer_norm(x, [8])

    (site,) = sites(nn.Sequential(Fast()), torch.randn(2, 8)).values()
    assert (site.path, site.refusal.code) == ("0:torch.nn.functional.layer_norm", "functional")


def test_unknown_norm_with_an_activation_is_reported() -> None:
    class MyNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act = nn.ReLU()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.act(x / x.norm())

    (site,) = sites(nn.Sequential(MyNorm()), torch.randn(2, 8)).values()
    assert site.refusal.code == "unknown-norm"


def test_everything_that_calls_itself_a_norm_is_reported() -> None:
    class MyNormAct(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.act = nn.Parameter(torch.ones(8)), nn.PReLU()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.act(x / x.norm() * self.weight)

    class WeightedRMSNorm(MyNormAct):
        pass

    class NormFreeBlock(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.Linear(8, 8))
            self.gain = nn.Parameter(torch.ones(8))

    model = nn.Sequential(MyNormAct(), WeightedRMSNorm(), NormFreeBlock(), nn.LayerNorm(8))
    codes = {path: site.refusal.code if site.refusal else None for path, site in sites(model).items()}
    assert codes == {"0": "unknown-norm", "1": "unknown-norm", "3": None}


def test_norms_in_containers_of_containers_are_reported() -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self._private, self.deep = [nn.LayerNorm(8)], {"a": [nn.Sequential(nn.LayerNorm(8))]}

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.deep["a"][0](self._private[0](x))

    found = sites(nn.Sequential(Holder()))
    assert {path for path, s in found.items() if s.refusal.code == "unregistered"} == {
        "0._private[0]",
        "0.deep['a'][0].0",
    }


@pytest.mark.parametrize("compute", [prune.l1_unstructured, None])
def test_computed_weights_are_refused(compute: object) -> None:
    norm = nn.BatchNorm1d(8)
    if compute:
        compute(norm, "weight", 0.5)
    else:
        torch.nn.utils.parametrizations.weight_norm(norm, dim=None)
    (site,) = sites(nn.Sequential(norm), torch.randn(2, 8)).values()
    assert site.refusal.code == "parametrized"


def test_two_functions_of_one_owner_are_two_sites() -> None:
    class Twice(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if x.is_contiguous() and float(x.shape[0]):
                x = torch.layer_norm(x, (8,))
            return torch.nn.functional.layer_norm(x, (8,)) + torch.nn.functional.group_norm(x, 2)

    found = sites(nn.Sequential(Twice()), torch.randn(2, 8))
    assert len(found) == 3
    assert len(ilmconvert.inspect(nn.Sequential(Twice()), example_inputs=torch.randn(2, 8)).skipped) == 3
