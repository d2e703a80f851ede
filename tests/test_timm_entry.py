"""Converted folders through timm.create_model, whichever is imported first."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch

import ilmconvert
from ilmconvert.errors import CheckpointError, UsageError
from ilmconvert.nn import ILMNorm
from tests.helpers import randomize_norms


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = randomize_norms(timm.create_model("test_resnet", num_classes=5))
    return ilmconvert.convert(model).save(tmp_path_factory.mktemp("timm") / "resnet-ilm")


LOOK = "import importlib.util; importlib.util.find_spec('timm')"  # as transformers and lightning do


@pytest.mark.parametrize(
    "imports",
    [
        "import ilmconvert, timm",
        pytest.param("import timm, ilmconvert", marks=pytest.mark.slow),
        pytest.param(f"import ilmconvert; {LOOK}; import timm", marks=pytest.mark.slow),
    ],
)
def test_in_a_fresh_interpreter(folder: Path, imports: str) -> None:
    code = (
        f"import sys; {imports}; "
        "assert not any(type(f).__name__ == '_AfterTimm' for f in sys.meta_path); "
        f"m = timm.create_model('ilmconvert', folder={str(folder)!r}); print(type(m).__name__, m.num_classes)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (result.stdout, result.stderr) == ("ResNet 5\n", "")


def test_import_alone_imports_neither_torch_nor_timm() -> None:
    code = "import sys, ilmconvert; sys.exit('torch' in sys.modules or 'timm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_weights_are_in_and_the_classifier_can_be_reset(folder: Path) -> None:
    x = torch.randn(2, 3, 64, 64)
    loaded = ilmconvert.load(folder)
    model = timm.create_model("ilmconvert", pretrained=True, folder=str(folder), in_chans=3, drop_rate=0.0)
    assert model.training
    with torch.no_grad():
        assert torch.equal(model.eval()(x), loaded(x))
    kept = timm.create_model("ilmconvert", folder=folder, num_classes=5)  # as timm's own scripts pass it
    assert torch.equal(kept.fc.weight, loaded.fc.weight)
    reset = timm.create_model("ilmconvert", folder=folder, num_classes=10)
    assert reset(x).shape == (2, 10)
    assert torch.equal(reset.conv1[0].weight, loaded.conv1[0].weight)
    assert sum(isinstance(m, ILMNorm) for m in reset.modules()) == 15


def test_wrong_requests_are_refused(folder: Path, tmp_path: Path) -> None:
    for arguments, message in (
        ({}, "with a folder saved by ilmconvert"),
        ({"folder": folder, "in_chans": 1}, "in_chans=1"),
        ({"folder": folder, "drop_path_rate": 0.1, "depth": 3}, "depth=3, drop_path_rate=0.1"),
    ):
        with pytest.raises(UsageError, match=message):
            timm.create_model("ilmconvert", **arguments)
    with pytest.raises(CheckpointError, match="expected a folder saved by ilmconvert"):
        timm.create_model("ilmconvert", folder=tmp_path)


def test_factories_of_folders_are_not_called_unasked(tmp_path: Path) -> None:
    from tests.models import small_cnn

    folder = ilmconvert.convert(small_cnn()).save(tmp_path / "cnn", factory="tests.models:small_cnn")
    with pytest.raises(CheckpointError, match="trust_factory=True"):
        timm.create_model("ilmconvert", folder=folder)
    given = {"folder": folder, "trust_factory": True}
    assert timm.create_model("ilmconvert", **given, num_classes=5)[0].out_channels == 16
    with pytest.raises(
        UsageError, match=r"^expected num_classes=5, since the Sequential in .* another head, got 7; put"
    ):
        timm.create_model("ilmconvert", **given, num_classes=7)
