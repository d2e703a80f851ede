"""The documentation shows what really happens."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import ilmconvert

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "docs" / name for name in ("getting-started.md", "calibration.md", "diff.md")]


def console_steps(page: Path) -> list[tuple[str, str]]:
    """(command, expected output) of every console block."""
    steps: list[tuple[str, str]] = []
    for block in re.findall(r"```console\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        for step in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, _, output = step.partition("\n")
            steps.append((command, output))
    return steps


def matches(expected: str, printed: str) -> bool:
    """Equal up to lines left out (``...``) and trailing blanks."""
    lines = [re.escape(line.rstrip()) for line in expected.rstrip("\n").split("\n")]
    pattern = "\n".join("(?s:.*)" if line == re.escape("...") else line for line in lines)
    got = "\n".join(line.rstrip() for line in printed.rstrip("\n").split("\n"))
    return re.fullmatch(pattern, got) is not None


def photographs(folder: Path) -> None:
    """Twelve images and a damaged one."""
    folder.mkdir()
    for number in range(12):
        Image.effect_noise((200, 180), 10 * number + 5).convert("RGB").save(folder / f"{number}.png")
    (folder / "broken.png").write_text("no image")


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_console_blocks_print_what_they_show(page: Path, tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "LC_ALL": "C",
    }
    steps = console_steps(page)
    assert steps
    photographs(tmp_path / "photos")
    for command, expected in steps:
        result = subprocess.run(
            command, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert matches(expected, result.stdout + result.stderr), f"$ {command}\n{result.stdout}{result.stderr}"


def test_generated_pages_are_up_to_date() -> None:
    command = [sys.executable, str(ROOT / "docs" / "generate.py"), "--check"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_real_diffs_are_up_to_date() -> None:
    command = [sys.executable, str(ROOT / "docs" / "diffs" / "real_diffs.py"), "--check"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_links_lead_somewhere() -> None:
    for page in [*(ROOT / "docs").glob("*.md"), ROOT / "README.md"]:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_python_page_has_every_public_name() -> None:
    page = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)) == sorted(ilmconvert.__all__)


def test_ci_runs_the_readmes_commands() -> None:
    commands = re.findall(r"```sh\n(python -m venv .*?)\n```", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert len(commands) == 2
    assert "ilmconvert convert resnet18 --output resnet18-ilm" in commands[0]
    assert commands[1].endswith("pytest -n 2")
