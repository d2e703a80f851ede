"""Parameter groups: every trainable parameter exactly once, in the group that it belongs to."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import timm
import torch
from timm.optim import param_groups_weight_decay
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.utils.parametrizations import weight_norm

import ilmconvert
from ilmconvert.errors import UsageError
from ilmconvert.nn import ILMNorm
from tests.models import TiedNorm


def names(model: nn.Module, groups: list[dict]) -> dict[str, set[str]]:
    known = {parameter: name for name, parameter in model.named_parameters()}
    return {group["name"]: {known[p] for p in group["params"]} for group in groups}


def test_groups_of_a_mixed_model_are_exact() -> None:
    model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.GroupNorm(2, 32), nn.Linear(4, 4))
    converted = ilmconvert.convert(model, gains=True, exclude="2").model
    groups = ilmconvert.parameter_groups(converted, lr=0.1, weight_decay=0.2, meta_lr_scale=0.3)
    predictor = {f"1.predictor.{part}.weight" for part in ("encoder", "scale_decoder", "shift_decoder")}
    assert names(converted, groups) == {
        "meta": predictor | {"1.scale_gain", "1.shift_gain"},
        "norm": {"0.bias", "1.weight", "1.bias", "2.weight", "2.bias", "3.bias"},
        "rest": {"0.weight", "3.weight"},
    }
    rates = {group["name"]: (group["lr"], group["weight_decay"]) for group in groups}
    assert rates == {"meta": (pytest.approx(0.03), 0.0), "norm": (0.1, 0.0), "rest": (0.1, 0.2)}
    optimizer = torch.optim.SGD([*groups, {"params": nn.Linear(4, 2).parameters(), "lr": 1.0}], momentum=0.9)
    assert [group["lr"] for group in optimizer.param_groups] == [pytest.approx(0.03), 0.1, 0.1, 1.0]


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_efficientnet_gn", "test_convnext"])
def test_every_parameter_once_in_real_models(name: str) -> None:
    model = ilmconvert.convert(timm.create_model(name)).model
    groups = ilmconvert.parameter_groups(model, lr=0.1, weight_decay=0.1)
    grouped = [p for group in groups for p in group["params"]]
    assert len(grouped) == len(set(grouped)) == len(list(model.parameters()))
    undecayed = {p for group in groups if group["weight_decay"] == 0 for p in group["params"]}
    layers = [m for m in model.modules() if isinstance(m, ILMNorm)]
    assert layers
    assert {p for layer in layers for p in layer.parameters()} <= undecayed
    assert not {m.weight for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear)) and m.bias is not None} & (
        undecayed - {p for layer in layers for p in layer.parameters()}
    )


def test_what_the_model_wants_undecayed_is() -> None:
    model = timm.create_model("test_vit")
    groups = names(model, ilmconvert.parameter_groups(model, lr=0.1))
    assert {"pos_embed", "cls_token"} <= groups["norm"]
    assert "meta" not in groups


@pytest.mark.parametrize("name", ["test_convnext", "test_vit2", "cait_xxs24_224"])
def test_what_timm_does_not_decay_is_not_decayed(name: str) -> None:
    """But for the predictors' matrices, which timm knows nothing of."""
    model = ilmconvert.convert(timm.create_model(name)).model
    named = getattr(model, "no_weight_decay", set)()
    theirs = param_groups_weight_decay(model, 0.1, no_weight_decay_list=named)
    decayed = {p for group in theirs if group["weight_decay"] for p in group["params"]}
    meta, _, rest = ilmconvert.parameter_groups(model, lr=0.1, weight_decay=0.1)
    assert set(rest["params"]) == decayed - set(meta["params"])


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of this process."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "ddp": nn.parallel.DistributedDataParallel,
    "compile": torch.compile,
    "compiled ddp": lambda model: torch.compile(nn.parallel.DistributedDataParallel(model)),
    "fsdp": lambda model: fully_shard(model, mesh=init_device_mesh("cpu", (1,))),
    "own": nn.Sequential,
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.usefixtures("alone")
def test_wrapped_models_have_the_groups_of_the_model(wrapper: str) -> None:
    model = ilmconvert.convert(timm.create_model("test_vit")).model
    wanted = names(model, ilmconvert.parameter_groups(model, lr=0.1))
    wrapped = WRAPPERS[wrapper](model)
    groups = ilmconvert.parameter_groups(wrapped, lr=0.1)
    assert names(model, groups) == wanted
    assert {"pos_embed", "cls_token"} <= wanted["norm"]


def test_tied_parameters_are_in_one_group() -> None:
    model = ilmconvert.convert(TiedNorm()).model
    model.extra = nn.Linear(32, 32, bias=False)
    model.extra.weight = model.block[0].weight = nn.Parameter(torch.randn(32, 32, 1, 1))
    model.scale = model.norm1.weight  # a norm's scale used elsewhere stays a norm's scale
    groups = ilmconvert.parameter_groups(model, lr=0.1, weight_decay=0.1)
    grouped = [p for group in groups for p in group["params"]]
    assert len(grouped) == len(set(grouped)) == len(list(model.parameters()))
    assert any(p is model.scale for p in groups[1]["params"])


def test_frozen_parameters_are_left_out() -> None:
    model = ilmconvert.convert(timm.create_model("test_resnet")).model
    model.fc.weight.requires_grad_(False)
    everything = {n for part in names(model, ilmconvert.parameter_groups(model, lr=0.1)).values() for n in part}
    assert everything == {n for n, _ in model.named_parameters()} - {"fc.weight"}

    layers = names(model, ilmconvert.parameter_groups(model, lr=0.1, freeze=True))
    paths = [name for name, m in model.named_modules() if isinstance(m, ILMNorm)]
    assert set(layers) == {"meta", "norm"}
    assert layers["norm"] == {f"{path}.{name}" for path in paths for name in ("weight", "bias")}

    some = names(model, ilmconvert.parameter_groups(model, lr=0.1, freeze=["layer1.*", "conv1.*"]))
    assert {n for part in some.values() for n in part} == {
        n for n in everything if not n.startswith(("layer1.", "conv1."))
    }
    assert model.conv1[0].weight.requires_grad  # the model is left as it is


def test_wrong_requests_are_refused() -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(UsageError, match="'layer9"):
        ilmconvert.parameter_groups(model, lr=0.1, freeze="layer9.*")
    with pytest.raises(UsageError, match="expected weight_decay of at least 0"):
        ilmconvert.parameter_groups(model, lr=0.1, weight_decay=-1)
    with pytest.raises(UsageError, match="all are frozen"):
        ilmconvert.parameter_groups(model, lr=0.1, freeze=True)


def test_a_computed_scale_is_a_scale() -> None:
    model = nn.Sequential(nn.Linear(8, 8), weight_norm(nn.LayerNorm(8), dim=None))
    converted = ilmconvert.convert(model).model
    groups = names(converted, ilmconvert.parameter_groups(converted, lr=0.1))
    assert {f"1.parametrizations.weight.original{i}" for i in (0, 1)} <= groups["norm"]
    assert all(name.startswith("1.predictor.") for name in groups["meta"])


def test_a_conversion_is_no_model() -> None:
    with pytest.raises(UsageError, match="got Conversion; give its model"):
        ilmconvert.parameter_groups(ilmconvert.convert(nn.Sequential(nn.LayerNorm(8))), lr=0.1)
