"""Reading checkpoint files: safetensors and torch files, never executing anything."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from ilmconvert.checkpoint import load_weights
from ilmconvert.errors import CheckpointError
from tests.helpers import same_state


class Evil:
    def __reduce__(self) -> tuple:
        return (Path.write_text, (Path("pwned"), "x"))


@pytest.mark.parametrize("kind", ["safetensors", "plain", "wrapped", "parallel", "ema"])
def test_formats(kind: str, tmp_path: Path) -> None:
    source, model = timm.create_model("test_resnet"), timm.create_model("test_resnet")
    state = source.state_dict()
    file = tmp_path / ("weights.safetensors" if kind == "safetensors" else "weights.pth")
    if kind == "safetensors":
        save_file(state, file)
    else:
        wrapped = {
            "plain": state,
            "wrapped": {"state_dict": state, "epoch": 1},
            "parallel": {f"module.{k}": v for k, v in state.items()},
            "ema": {"state_dict": model.state_dict(), "state_dict_ema": state},
        }[kind]
        torch.save(wrapped, file)
    assert not same_state(source, model)
    load_weights(model, file)
    assert same_state(source, model)


def test_no_pickle_is_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("evil.pth").write_bytes(pickle.dumps({"a": Evil()}, protocol=2))
    with pytest.raises(CheckpointError, match="a torch file of plain tensors") as raised:
        load_weights(timm.create_model("test_resnet"), "evil.pth")
    assert "weights_only=False" not in str(raised.value)
    assert not Path("pwned").exists()


def test_safetensors_under_another_name_are_told(tmp_path: Path) -> None:
    file = tmp_path / "weights.pth"
    save_file({"fc.weight": torch.ones(1)}, file)
    with pytest.raises(CheckpointError) as raised:
        load_weights(timm.create_model("test_resnet"), file)
    told = f"expected a torch file at {str(file)!r}, found safetensors; rename it to end in .safetensors"
    assert str(raised.value) == told


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "expected a checkpoint file at .*found none"),
        (b"rubbish", "it is none or damaged"),
        ({"epoch": 3}, "expected tensors by name"),
        ({"fc.weight": torch.ones(1)}, "of another shape: fc.weight .*Build the model as the saved one was"),
    ],
)
def test_unreadable_and_unfit_files(content: object, message: str, tmp_path: Path) -> None:
    file = tmp_path / "weights.pth"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content is not None:
        torch.save(content, file)
    with pytest.raises(CheckpointError, match=message):
        load_weights(timm.create_model("test_resnet"), file)


@pytest.mark.filterwarnings("ignore:Validating sparse tensor")
@pytest.mark.parametrize(
    ("change", "message"),
    [(lambda t: t.to("meta"), "Cannot copy out of meta tensor"), (torch.Tensor.to_sparse, "between dense and sparse")],
    ids=["meta", "sparse"],
)
def test_tensors_that_cannot_be_copied_are_told(change: object, message: str, tmp_path: Path) -> None:
    model = timm.create_model("test_resnet")
    state = model.state_dict()
    torch.save({**state, "fc.weight": change(state["fc.weight"])}, tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match=f"expected dense tensors with values in .*fc.weight.*{message}"):
        load_weights(model, tmp_path / "weights.pth")


@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (lambda state: {"net": state, "epoch": 3}, r"a dict of 'net', 'epoch'; save the entry by itself: .*\['net'\]"),
        (lambda state: {f"model.{k}": v for k, v in state.items()}, "Its names begin with 'model.': remove that"),
    ],
    ids=["inside an entry", "a prefix"],
)
def test_what_is_found_instead_of_the_weights_is_told(wrap: object, message: str, tmp_path: Path) -> None:
    model = timm.create_model("test_resnet")
    torch.save(wrap(model.state_dict()), tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match=message):
        load_weights(model, tmp_path / "weights.pth")
