"""Saving and loading: bit for bit in a new process, all or nothing, and clear refusals."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import ilmconvert
from ilmconvert.checkpoint import save
from ilmconvert.checkpoint.folder import write_beside
from ilmconvert.errors import CheckpointError, IlmconvertError, OutputExistsError, PlanError
from ilmconvert.nn import ILMNorm
from tests.helpers import full_disk, randomize_norms, same_state
from tests.models import Branching, TiedNorm, small_cnn

SCRIPT = """
import sys, torch, ilmconvert
torch.set_num_threads(1)
model = ilmconvert.load(sys.argv[1])
assert not model.training
torch.save(model(torch.load(sys.argv[2])), sys.argv[3])
"""


def outputs_in_a_new_process(folder: Path, x: torch.Tensor, tmp_path: Path) -> torch.Tensor:
    torch.save(x, tmp_path / "x.pt")
    command = [sys.executable, "-c", SCRIPT, str(folder), str(tmp_path / "x.pt"), str(tmp_path / "y.pt")]
    subprocess.run(command, check=True, cwd=Path(__file__).parents[2])
    return torch.load(tmp_path / "y.pt")


@pytest.mark.parametrize(
    ("name", "args", "options"),
    [
        ("test_efficientnet", {"num_classes": 7, "in_chans": 1}, {"bn_to": "group", "group_size": 8, "gains": True}),
        pytest.param("test_vit", {"img_size": 96}, {}, marks=pytest.mark.slow),
        pytest.param("test_resnet", {}, {"mode": "paper", "exclude": "bn1"}, marks=pytest.mark.slow),
    ],
)
def test_equal_bit_for_bit_in_a_new_process(name: str, args: dict, options: dict, tmp_path: Path) -> None:
    model = randomize_norms(timm.create_model(name, **args))
    conversion = ilmconvert.convert(model, **options)
    folder = conversion.save(tmp_path / "saved")
    x = torch.randn(2, args.get("in_chans", 3), args.get("img_size", 160), args.get("img_size", 160))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    expected = conversion.model.eval()(x)
    torch.set_num_threads(threads)
    assert torch.equal(outputs_in_a_new_process(folder, x, tmp_path), expected)
    assert sorted(p.name for p in folder.iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
        "original_norms.safetensors",
        "plan.json",
    ]


def test_config_is_timms_own(tmp_path: Path) -> None:
    model = timm.create_model("test_resnet", num_classes=5)
    folder = ilmconvert.convert(model).save(tmp_path / "saved")
    config = json.loads((folder / "config.json").read_text())
    assert (config["architecture"], config["num_classes"]) == ("test_resnet", 5)
    rebuilt = timm.create_model(f"local-dir:{folder}")  # timm reads it by itself
    assert [tuple(p.shape) for p in rebuilt.parameters()] == [tuple(p.shape) for p in model.parameters()]
    card = (folder / "README.md").read_text()
    assert "# test_resnet, converted to ILM-Norm" in card
    assert str(ilmconvert.convert(model).report) in card
    assert "library_name: timm\n" in card


def test_head_reset_after_conversion_is_saved(tmp_path: Path) -> None:
    conversion = ilmconvert.convert(timm.create_model("test_resnet"))
    conversion.model.reset_classifier(3)
    loaded = ilmconvert.load(conversion.save(tmp_path / "saved"))
    assert loaded.num_classes == 3
    assert same_state(conversion.model, loaded)


def test_loaded_conversion_is_complete(tmp_path: Path) -> None:
    model = randomize_norms(timm.create_model("test_efficientnet"))
    conversion = ilmconvert.convert(model, bn_to="instance")
    loaded = ilmconvert.load_conversion(conversion.save(tmp_path / "saved"))
    assert loaded.plan == conversion.plan
    assert loaded.report == conversion.report
    assert same_state(model, loaded.revert())
    again = ilmconvert.load_conversion(loaded.save(tmp_path / "again"))
    assert same_state(conversion.model, again.model)


def test_factory_and_rebuilt_model(tmp_path: Path) -> None:
    model = randomize_norms(small_cnn(24))
    conversion = ilmconvert.convert(model)
    by_name = conversion.save(tmp_path / "by_name", factory="tests.models:small_cnn", model_args={"channels": 24})
    assert same_state(conversion.model, ilmconvert.load(by_name, trust_factory=True))
    with pytest.raises(CheckpointError, match="asks to import and call 'tests.models:small_cnn'; if you trust it"):
        ilmconvert.load(by_name)
    without = conversion.save(tmp_path / "without")
    assert same_state(conversion.model, ilmconvert.load(without, model=small_cnn(24)))
    with pytest.raises(CheckpointError, match=r"does not tell how to build its Sequential; .*model=original"):
        ilmconvert.load(without)
    with pytest.raises(PlanError, match="the plan is for another model"):
        ilmconvert.load(without, model=small_cnn(16))


@pytest.mark.parametrize("factory", ["tests.models:small_cnn", None])
def test_python_of_the_model_card_loads_the_folder(tmp_path: Path, factory: str | None) -> None:
    model = randomize_norms(small_cnn())
    conversion = ilmconvert.convert(model)
    folder = conversion.save(tmp_path / "saved", factory=factory)
    assert "library_name" not in (folder / "README.md").read_text()
    code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    names = {"the_rebuilt_original": small_cnn()}
    exec(code.replace("this folder", str(folder)), names)
    assert same_state(conversion.model, names["model"])


def parametrized_norms() -> nn.Module:
    fused = timm.layers.GroupNormAct(8, 2, act_layer=nn.PReLU)
    return nn.Sequential(nn.Linear(8, 8), weight_norm(nn.LayerNorm(8), dim=None), weight_norm(fused, dim=None))


def test_parametrized_norms_are_restored(tmp_path: Path) -> None:
    model, x = parametrized_norms().eval(), torch.randn(3, 8)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    conversion = ilmconvert.convert(model, example_inputs=x)
    assert len(conversion.report.converted) == 2
    folder = conversion.save(tmp_path / "saved", factory=f"{__name__}:parametrized_norms")
    reverted = ilmconvert.load_conversion(folder, trust_factory=True).revert()
    assert same_state(model, reverted)
    assert torch.equal(model(x), reverted(x))


@pytest.mark.parametrize("make", [TiedNorm, Branching])
def test_tied_and_untraceable_models(make: type[nn.Module], tmp_path: Path) -> None:
    model = randomize_norms(make())
    conversion = ilmconvert.convert(model)
    loaded = ilmconvert.load_conversion(conversion.save(tmp_path / "saved"), model=make())
    assert same_state(conversion.model, loaded.model)
    assert same_state(model, loaded.revert())


def test_model_changed_by_hand_is_saved_with_a_warning(tmp_path: Path) -> None:
    model = timm.create_model("test_resnet")
    model.fc = nn.Sequential(nn.Linear(model.num_features, 10), nn.Linear(10, 2))
    conversion = ilmconvert.convert(model)
    with pytest.warns(UserWarning, match="test_resnet does not rebuild this model"):
        folder = conversion.save(tmp_path / "saved")
    assert same_state(conversion.model, ilmconvert.load(folder, model=model))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda m: setattr(m, "act1", nn.SiLU()), r"'act1' is \S+\.SiLU\(\) instead of \S+\.ReLU\(inplace=True\)$"),
        (lambda m: setattr(m, "maxpool", nn.Identity()), r"'maxpool' is nothing instead of \S+\.MaxPool2d\("),
        (lambda m: setattr(m.layer1[0].conv1, "padding_mode", "reflect"), r"mode=reflect\) instead of \S+Conv2d\("),
        (lambda m: m.layer2.append(nn.Flatten(0, 0)), r"'layer2.1' is \S+\.Flatten\(.*\) instead of nothing$"),
    ],
)
def test_a_change_that_no_weight_shows_is_saved_with_a_warning(
    change: Callable[[nn.Module], object], told: str, tmp_path: Path
) -> None:
    model = timm.create_model("test_resnet").eval()
    change(model)
    conversion, x = ilmconvert.convert(model), torch.randn(2, 3, 64, 64)
    with pytest.warns(UserWarning, match=f"^test_resnet does not rebuild this model, .* model=...: .*{told}"):
        folder = conversion.save(tmp_path / "saved")
    with pytest.raises(CheckpointError, match="does not tell how to build its ResNet"):
        ilmconvert.load(folder)
    assert torch.equal(ilmconvert.load(folder, model=model)(x), conversion.model(x))


def test_what_timm_itself_changes_is_saved_without_a_warning(tmp_path: Path) -> None:
    model = timm.create_model("test_vit", drop_path_rate=0.2, drop_rate=0.1, qk_norm=True)
    model.set_input_size(img_size=64)
    model.set_grad_checkpointing()
    model.reset_classifier(4, "avg")
    conversion, x = ilmconvert.convert(model.train()), torch.randn(2, 3, 64, 64)
    loaded = ilmconvert.load(conversion.save(tmp_path / "saved"))  # a warning is an error here
    assert torch.equal(loaded(x), conversion.model.eval()(x))


def test_nothing_is_overwritten_without_force(tmp_path: Path) -> None:
    conversion = ilmconvert.convert(small_cnn())
    folder = conversion.save(tmp_path / "saved")
    before = (folder / "model.safetensors").stat().st_mtime_ns
    with pytest.raises(OutputExistsError, match="exists; choose another, or give --force"):
        conversion.save(folder)
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    assert conversion.save(folder, force=True) == folder
    (tmp_path / "empty").mkdir()
    assert ilmconvert.load(conversion.save(tmp_path / "empty", force=True), model=small_cnn())
    other = tmp_path / "precious"
    other.mkdir()
    (other / "thesis.txt").write_text("mine")
    with pytest.raises(OutputExistsError, match="something else"):
        conversion.save(other, force=True)
    assert (other / "thesis.txt").read_text() == "mine"
    (folder / "train.log").write_text("mine too")
    with pytest.raises(OutputExistsError, match="something else: train.log"):
        conversion.save(folder, force=True)
    assert (folder / "train.log").exists()


@pytest.mark.parametrize("output", [".", "..", "../here"])
def test_the_working_directory_is_never_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str) -> None:
    conversion = ilmconvert.convert(small_cnn())
    here = conversion.save(tmp_path / "here")
    monkeypatch.chdir(here)
    with pytest.raises(OutputExistsError, match="holds the working directory"):
        conversion.save(output, force=True)
    assert len(list(here.iterdir())) == 5


@pytest.mark.parametrize("force", [False, True])
def test_a_failed_write_leaves_nothing_and_spoils_nothing(tmp_path: Path, force: bool) -> None:
    if force:
        ilmconvert.convert(small_cnn()).save(tmp_path / "saved")
    before = sorted(p.name for p in tmp_path.rglob("*"))

    def write() -> None:
        with write_beside(tmp_path / "saved", force=force) as folder:
            (folder / "half").write_text("x")
            raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        write()
    assert sorted(p.name for p in tmp_path.rglob("*")) == before


def test_a_failed_rename_leaves_the_folder_that_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = ilmconvert.convert(small_cnn()).save(tmp_path / "saved")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*.*")}
    replace = Path.replace

    def full(self: Path, target: Path) -> Path:
        if (self / "new").exists():
            raise OSError("disk full")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(IlmconvertError, match="disk full"), write_beside(folder, force=True) as beside:
        (beside / "new").touch()
    assert {p: p.read_bytes() for p in tmp_path.rglob("*.*")} == before
    assert list(tmp_path.iterdir()) == [folder]


def test_what_is_saved_may_be_read_by_whom_the_umask_lets(tmp_path: Path) -> None:
    mask = os.umask(0o022)
    try:
        folder = ilmconvert.convert(small_cnn()).save(tmp_path / "saved")
    finally:
        os.umask(mask)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o755
    assert {stat.S_IMODE(file.stat().st_mode) for file in folder.iterdir()} == {0o644}


@pytest.mark.parametrize("most", [300, 1000], ids=["weights", "plan"])
def test_a_full_disk_is_one_clear_error(tmp_path: Path, most: int) -> None:
    conversion = ilmconvert.convert(nn.Sequential(nn.LayerNorm(4)))
    with pytest.raises(IlmconvertError) as raised, full_disk(most):
        conversion.save(tmp_path / "saved")
    assert str(raised.value).startswith(f"cannot write in {str(tmp_path)!r}: ")
    assert "File too large" in str(raised.value)
    assert list(tmp_path.iterdir()) == []


def truncate(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def drop_key(folder: Path, file: str = "model.safetensors", key: str = "0.weight") -> None:
    state = load_file(folder / file)
    state.pop(key)
    save_file(state, folder / file)


def edit(folder: Path, **values: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["ilmconvert"] |= values
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, "the weights in .* do not load"),
        (drop_key, "do not load: .*0.weight"),
        (lambda f: (f / "plan.json").write_text("{"), "the plan in .* cannot be read"),
        (lambda f: (f / "plan.json").write_text("[" * 100_000), "the plan in .* nested too deeply"),
        (lambda f: (f / "config.json").write_text("[" * 100_000), "expected JSON in .* nested too deeply"),
        (lambda f: (f / "config.json").write_text("[]"), "expected a JSON object"),
        (lambda f: (f / "config.json").write_text('{"ilmconvert": []}'), "expected format_version 1"),
        (lambda f: (f / "config.json").write_text('{"ilmconvert": {"format_version": 99}}'), "from a newer release"),
        (lambda f: edit(f, factory=5), "expected 'factory' in .* to be a string, got 5"),
        (lambda f: edit(f, model_args=[]), r"expected 'model_args' in .* to be an object, got \[\]"),
        (lambda f: (f / "config.json").unlink(), "expected a folder saved by ilmconvert"),
        (lambda f: (f / "original_norms.safetensors").write_bytes(b"no"), "the original norms in .* cannot be read"),
        (lambda f: drop_key(f, "original_norms.safetensors", "4.bias"), "original_norms.* missing: 4.bias"),
    ],
)
def test_damaged_folders_are_refused(tmp_path: Path, damage: object, message: str) -> None:
    folder = ilmconvert.convert(small_cnn()).save(tmp_path / "saved", factory="tests.models:small_cnn")
    damage(folder)
    with pytest.raises(CheckpointError, match=message):
        ilmconvert.load(folder, trust_factory=True)


def test_channels_last_and_fine_tuned_weights(tmp_path: Path) -> None:
    conversion = ilmconvert.convert(small_cnn().to(memory_format=torch.channels_last))
    with torch.no_grad():
        for p in conversion.model.parameters():
            p.add_(torch.randn_like(p))
    folder = conversion.save(tmp_path / "saved", factory="tests.models:small_cnn")
    loaded = ilmconvert.load(folder, trust_factory=True)
    assert same_state(conversion.model, loaded)
    assert any(isinstance(m, ILMNorm) for m in loaded.modules())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes_are_restored(tmp_path: Path, dtype: torch.dtype) -> None:
    conversion = ilmconvert.convert(timm.create_model("test_vit").to(dtype))
    loaded = ilmconvert.load(conversion.save(tmp_path / "saved"))
    assert same_state(conversion.model, loaded)


def tied_head(dtype: torch.dtype = torch.float32) -> nn.Module:
    """An embedding and a decoder of one weight and one buffer, stored under the decoder's name."""
    layers = OrderedDict(embed=nn.Embedding(11, 8), norm=nn.LayerNorm(8), decoder=nn.Linear(8, 11))
    model = nn.Sequential(layers).to(dtype)
    model.decoder.weight = model.embed.weight
    model.embed.register_buffer("seen", torch.rand(4, dtype=dtype))
    model.decoder.register_buffer("seen", model.embed.seen)
    return model


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes_of_tied_weights_are_restored(tmp_path: Path, dtype: torch.dtype) -> None:
    conversion = ilmconvert.convert(tied_head(dtype))
    loaded = ilmconvert.load(conversion.save(tmp_path / "saved"), model=tied_head())
    assert same_state(conversion.model, loaded)
    assert loaded.embed.weight is loaded.decoder.weight
    assert loaded.embed.seen is loaded.decoder.seen
    tokens = torch.arange(11)
    assert torch.equal(loaded(tokens), conversion.model(tokens))


def test_model_with_a_new_head_of_norms(tmp_path: Path) -> None:
    """levit's classifier holds norms: after a reset they are new ones that the conversion knows nothing of."""
    conversion = ilmconvert.convert(timm.create_model("levit_128s"))
    conversion.model.reset_classifier(5)
    loaded = ilmconvert.load_conversion(conversion.save(tmp_path / "saved"))
    assert same_state(conversion.model, loaded.model)
    assert {d.path: d.code for d in loaded.report.skipped} == {"head.bn": "replaced", "head_dist.bn": "replaced"}
    assert isinstance(conversion.revert().head.bn, nn.BatchNorm1d)


def test_arguments_that_are_no_json_are_saved_with_a_warning(tmp_path: Path) -> None:
    model = timm.create_model("test_vit", norm_layer=nn.LayerNorm)
    conversion = ilmconvert.convert(model)
    with pytest.warns(UserWarning, match=r"load\(\) will need model="):
        folder = conversion.save(tmp_path / "saved")
    assert same_state(conversion.model, ilmconvert.load(folder, model=model))


def test_state_that_safetensors_cannot_write_is_a_clear_error(tmp_path: Path) -> None:
    model = nn.Sequential(nn.LayerNorm(4))
    model.register_buffer("wide", torch.zeros(1).expand(4))
    with pytest.raises(CheckpointError, match="which safetensors cannot write"):
        ilmconvert.convert(model).save(tmp_path / "saved")
    assert list(tmp_path.iterdir()) == []


def test_trained_activation_is_not_overwritten_by_the_original_norms(tmp_path: Path) -> None:
    norm = timm.layers.BatchNormAct2d(8, act_layer=nn.PReLU)
    conversion = ilmconvert.convert(nn.Sequential(norm))
    nn.init.constant_(conversion.model[0].act.weight, 0.7)
    folder = conversion.save(tmp_path / "saved")
    loaded = ilmconvert.load_conversion(folder, model=nn.Sequential(norm))
    assert loaded.model[0].act.weight.item() == pytest.approx(0.7)
    assert loaded.revert()[0].act.weight.item() == pytest.approx(0.7)


def test_a_factorys_model_with_another_head_is_saved_with_a_warning(tmp_path: Path) -> None:
    folder = ilmconvert.convert(small_cnn()).save(tmp_path / "saved", factory="tests.models:small_cnn")
    conversion = ilmconvert.load_conversion(folder, trust_factory=True)
    last = [name for name, m in conversion.model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))][-1]
    conversion.model.set_submodule(last, nn.Conv2d(3, 7, 5))
    with pytest.warns(UserWarning, match=r"load\(\) will need model="):
        changed = conversion.save(tmp_path / "changed")
    with pytest.raises(CheckpointError, match="model="):
        ilmconvert.load(changed, trust_factory=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"factory": "factory"}, "expected package.module:factory, got 'factory'"),
        ({"factory": "a:b", "model_args": {"x": object()}}, "expected model_args of JSON types, but: Object of"),
        ({"records": {"../x": b""}}, "expected records among calibration.json, .*, got ../x"),
    ],
)
def test_wrong_requests_write_nothing(tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        save(ilmconvert.convert(small_cnn()), tmp_path / "saved", **options)
    assert list(tmp_path.iterdir()) == []
