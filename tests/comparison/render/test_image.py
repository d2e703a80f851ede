"""Drawings by graphviz, and what is said where it is missing."""

from __future__ import annotations

import re
import subprocess
import sys
from xml.etree import ElementTree

import pytest

from ilmconvert.comparison.render.image import source
from ilmconvert.errors import IlmconvertError, UsageError
from tests.comparison.models import every_kind, hostile_diff
from tests.helpers import needs_dot

graphviz = pytest.importorskip("graphviz", reason="needs the package graphviz: pip install -e '.[diagram]'")


def drawn_texts(svg: bytes) -> list[str]:
    return [e.text or "" for e in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]


@needs_dot
def test_the_whole_graph() -> None:
    texts = drawn_texts(every_kind().to_image("svg"))
    assert "BatchNorm2d -> GroupNorm" in texts
    assert texts.count("conv") == 3
    assert "MaxPool2d" in texts


@needs_dot
def test_one_block() -> None:
    diff = every_kind()
    texts = drawn_texts(diff.to_image("svg", block="blocks.0"))
    assert {"conv", "norm", "act", "add(*, *)"} <= set(texts)
    assert "stem" not in texts
    assert diff.to_image("png", block="blocks.0").startswith(b"\x89PNG")
    edges = re.findall(r"\tn(\d+) -> n(\d+)", source(diff, block="blocks.0").source)
    names = {i: row.path for i, row in enumerate(diff.rows)}
    assert {(names[int(a)], names[int(b)]) for a, b in edges} == {
        ("blocks.0.conv", "blocks.0.norm"),
        ("blocks.0.norm", "blocks.0:add"),
        ("blocks.0:add", "blocks.0.act"),
    }


@needs_dot
def test_hostile_names_are_text() -> None:
    texts = drawn_texts(hostile_diff().to_image("svg"))
    assert "<script>alert(1)</script>" in texts
    assert "\"quoted\" 'name'" in texts
    assert any("\\x1b[31m" in text for text in texts)


def test_unknown_block() -> None:
    with pytest.raises(UsageError, match=r"got 'stem.0'; blocks are stem, blocks"):
        every_kind().to_image("svg", block="stem.0")


def test_missing_dot_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(IlmconvertError, match="needs graphviz's program 'dot'"):
        every_kind().to_image("svg")


def test_missing_package_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "graphviz", None)
    with pytest.raises(IlmconvertError, match=r"pip install 'ilmconvert\[diagram\]'"):
        every_kind().to_image("svg")


def test_the_library_starts_without_it() -> None:
    code = "import sys, ilmconvert.comparison; sys.exit('graphviz' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
