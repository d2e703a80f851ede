"""The building's rules: floors, public names, start-up."""

from __future__ import annotations

import ast
import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

import ilmconvert

ROOT = Path(__file__).parents[1] / "ilmconvert"
FLOORS = {
    "errors": 0,
    "wording": 0,
    "collector": 0.5,
    "disk": 0.5,
    "quiet": 0.5,
    "jsonable": 0.5,
    "processes": 0.5,
    "metrics": 0.7,
    "fingerprint": 0.5,
    "finite": 0.5,
    "nn": 1,
    "norms": 2,
    "graph": 3,
    "options": 3,
    "sources": 3,
    "comparison": 4,
    "images": 3,
    "plan": 4,
    "report": 4.5,
    "folding": 4.5,
    "redirection": 4.5,
    "rewrite": 5,
    "probing": 5,
    "verification": 6,
    "calibration": 6,
    "conversion": 6,
    "training": 6,
    "timm_entry": 8,
    "checkpoint": 7,
    "survey": 7,
}
LATE = {("conversion", "checkpoint")}  # Conversion.save is sugar for checkpoint.save, imported when it is called


def imports(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("ilmconvert"):
            names = [node.module] if node.module != "ilmconvert" else [f"ilmconvert.{a.name}" for a in node.names]
            found |= {name.split(".")[1] for name in names if "." in name}
    return found & set(FLOORS)


@pytest.mark.parametrize("file", sorted(ROOT.rglob("*.py")), ids=lambda f: str(f.relative_to(ROOT)))
def test_imports_go_to_lower_floors(file: Path) -> None:
    home = file.relative_to(ROOT).parts[0].removesuffix(".py")
    if home not in FLOORS:
        assert home in ("__init__", "__main__")
        return
    for other in imports(file) - {home}:
        assert FLOORS[other] < FLOORS[home] or (home, other) in LATE, f"{home} imports {other}"


def test_library_knows_neither_click_nor_rich() -> None:
    for file in ROOT.rglob("*.py"):
        modules = [n for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, (ast.Import, ast.ImportFrom))]
        names = {a.name for n in modules if isinstance(n, ast.Import) for a in n.names} | {
            n.module for n in modules if isinstance(n, ast.ImportFrom) and n.module
        }
        assert not {name.split(".")[0] for name in names} & {"click", "rich"}, file


def test_public_names_are_these() -> None:
    assert ilmconvert.__all__ == sorted(ilmconvert.__all__)
    assert set(ilmconvert.__all__) == {
        "Calibration",
        "Conversion",
        "ConvertOptions",
        "GraphDiff",
        "Plan",
        "RecoverOptions",
        "Recovery",
        "Report",
        "apply_plan",
        "calibrate",
        "checkpoint",
        "convert",
        "convert_",
        "diff",
        "errors",
        "images",
        "inspect",
        "load",
        "load_conversion",
        "metrics",
        "nn",
        "norms",
        "parameter_groups",
        "recover",
        "verify",
    }
    assert all(getattr(ilmconvert, name) is not None for name in ilmconvert.__all__)
    assert set(ilmconvert.__all__) <= set(dir(ilmconvert))
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        _ = ilmconvert.nonsense


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["convert", "--help"], ["convert", "resnet18"]])
def test_answers_without_importing_torch(arguments: list[str]) -> None:
    code = f"import sys; from ilmconvert_cli.main import main; main({arguments!r}); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


def test_version_is_that_of_the_distribution() -> None:
    assert importlib.metadata.version("ilmconvert") == ilmconvert.__version__


def test_files_stay_readable() -> None:
    sizes = {file: len(file.read_text().splitlines()) for file in ROOT.rglob("*.py")}
    assert [file for file, lines in sizes.items() if lines > 400] == []
