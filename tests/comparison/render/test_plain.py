"""The renderers of plain text: snapshots, widths, folding, hostile names."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
import timm
import torch

import ilmconvert
from ilmconvert.comparison import GraphDiff
from ilmconvert.comparison.render.unified import outline
from tests.comparison.models import HOSTILE, Small, every_kind, hostile_diff

FIXTURES = Path(__file__).parents[2] / "fixtures" / "diff"
SNAPSHOTS = {
    "every_kind.txt": lambda: every_kind().to_text(),
    "every_kind_all.txt": lambda: every_kind().to_text(unfold=True, width=100),
    "every_kind_summary.txt": lambda: every_kind().to_summary(),
    "every_kind.diff": lambda: every_kind().to_unified(),
    "every_kind.md": lambda: every_kind().to_markdown(),
    "numerics.txt": lambda: with_numerics().to_text(),
    "numerics.md": lambda: with_numerics().to_markdown(),
}


def with_numerics() -> GraphDiff:
    conversion = ilmconvert.convert(torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.LayerNorm(16)))
    return conversion.diff(numerics=torch.randn(2, 4))


@pytest.mark.parametrize("name", SNAPSHOTS)
def test_snapshots(name: str) -> None:
    """``UPDATE_SNAPSHOTS=1 pytest`` writes them anew; look at the difference before committing it."""
    got = SNAPSHOTS[name]()
    if "UPDATE_SNAPSHOTS" in os.environ:
        (FIXTURES / name).write_text(got, encoding="utf-8")
    assert got == (FIXTURES / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("width", [40, 80, 120])
@pytest.mark.parametrize("make", [every_kind, hostile_diff, with_numerics])
def test_text_fits(make: object, width: int) -> None:
    diff = make()  # type: ignore[operator]
    for text in (diff.to_text(width=width), diff.to_text(width=width, unfold=True), diff.to_summary(width=width)):
        assert max(map(len, text.splitlines())) <= width
    assert len(diff.to_summary().splitlines()) <= 10


def test_folding_leaves_nothing_out() -> None:
    diff = every_kind()
    folded = sum(int(n) for n in re.findall(r"\.\.\. (\d+) unchanged", diff.to_text()))
    shown = sum(line.startswith("  ") for line in diff.to_text().splitlines())
    assert folded < diff.counts["unchanged"] < folded + shown
    everything = diff.to_text(unfold=True)
    assert "unchanged\n" not in everything.split("\n\n", 1)[1]
    for row in diff.rows:
        a, b = diff.nodes(row)
        node = b or a
        assert node.name.split("#")[0].split(":")[-1] in everything


@pytest.mark.parametrize("form", ["to_text", "to_summary", "to_unified", "to_markdown"])
def test_hostile_names_are_text(form: str) -> None:
    printed = getattr(hostile_diff(), form)()
    assert all(c.isprintable() or c == "\n" for c in printed)
    if form != "to_summary":
        assert "größe_层_🙂" in printed
    if form == "to_markdown":
        outside = re.sub(r"(`+)(?!`).*?(?<!`)\1(?!`)", "", printed)
        assert not re.search(r"<(?!br>|/?details>|/?summary>)", outside)
        cells = {
            len(re.findall(r"(?<!\\)\|", line))
            for line in printed.rpartition("| --- |")[2].splitlines()
            if line[:1] == "|"
        }
        assert cells == {6}


def test_what_could_not_be_run_or_read_is_told() -> None:
    from dataclasses import replace

    from tests.models import Failing

    diff = ilmconvert.diff(Failing(), Failing(), example_inputs=torch.zeros(1, 8, 2, 2))
    for text in (diff.to_text(), diff.to_summary(), diff.to_markdown()):
        assert "run for shapes and counts: RuntimeError: no forward today" in text
    diff = with_numerics()
    run = replace(diff.numerics, notes=("not read: broken.jpg",))
    for text in (replace(diff, numerics=run).to_text(), replace(diff, numerics=run).to_markdown()):
        assert "not read: broken.jpg" in text


def test_unified_is_what_patch_takes(tmp_path: Path) -> None:
    for diff in (every_kind(), hostile_diff(), with_numerics()):
        old, new = ("".join(f"{line}\n" for line in outline(g)) for g in (diff.before, diff.after))
        file = tmp_path / "outline"
        file.write_text(old, encoding="utf-8")
        command = ["git", "apply", "--unsafe-paths", "-p1", "-"]
        lines = diff.to_unified().split("\n", 2)
        patch = "\n".join(["--- a/outline", "+++ b/outline", lines[2]])
        subprocess.run(command, input=patch, text=True, encoding="utf-8", cwd=tmp_path, check=True)
        assert file.read_text(encoding="utf-8") == new


def test_outline_is_stable() -> None:
    def lines() -> list[str]:
        return list(outline(ilmconvert.diff(timm.create_model("test_vit"), Small()).before))

    first = lines()
    assert first == lines()
    assert not re.search(r"0x[0-9a-f]{6}", "\n".join(first))
    assert "blocks.0.norm1: timm.layers.norm.LayerNorm" in first
    assert "blocks.0.norm1.eps = 1e-06" in first
    assert len(HOSTILE) == 8
