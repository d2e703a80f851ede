"""The renderers of plain text: snapshots, widths, folding, hostile names."""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

import ilmconvert
from ilmconvert.comparison import GraphDiff, Totals
from ilmconvert.comparison.render.unified import outline
from tests.comparison.models import HOSTILE, LONG, Run, Small, every_kind, hostile_diff, shifted

SNAPSHOT_FOLDER = Path(__file__).parents[2] / "fixtures" / "diff"
SNAPSHOTS = {
    "every_kind.txt": lambda: every_kind().to_text(),
    "every_kind_all.txt": lambda: every_kind().to_text(unfold=True, width=100),
    "every_kind_summary.txt": lambda: every_kind().to_summary(),
    "every_kind.diff": lambda: every_kind().to_unified(),
    "every_kind.md": lambda: every_kind().to_markdown(),
    "shifted.txt": lambda: shifted().to_text(),
    "shifted.md": lambda: shifted().to_markdown(),
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
        (SNAPSHOT_FOLDER / name).write_text(got, encoding="utf-8")
    assert got == (SNAPSHOT_FOLDER / name).read_text(encoding="utf-8")


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


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        (1_814_073_344, 1_814_073_504, ("1.814 G", "1.814 G", "+160")),
        (1_000_000, 1_200_000, ("1.000 M", "1.200 M", "+20.00 %")),
        (10**9, 10**9 - 2, ("1.000 G", "1.000 G", "-2")),
        (0, 12, ("0", "12", "+12")),
        (10**9, 10**9, ("1.000 G", "1.000 G", "")),
    ],
)
def test_totals_that_differ_are_never_told_as_equal(before: int, after: int, told: tuple[str, str, str]) -> None:
    diff = every_kind()
    graphs = (replace(g, totals=Totals(0, 0, n)) for g, n in ((diff.before, before), (diff.after, after)))
    diff = replace(diff, **dict(zip(("before", "after"), graphs, strict=True)))
    macs = f"{told[0]} -> {told[1]} ({told[2]})" if told[2] else told[0]
    assert f"  MACs: {macs}\n" in diff.to_text()
    assert f"| MACs | {' | '.join(told)} |" in diff.to_markdown()


class Widths(nn.Module):
    """Has an attribute that is longer than what is shown."""

    def __init__(self, last: int) -> None:
        super().__init__()
        self.widths, self.layer = [*range(100), last], nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def test_long_values_are_compared_whole_and_shown_where_they_differ() -> None:
    assert ilmconvert.diff(Widths(7), Widths(7)).equal
    diff = ilmconvert.diff(Widths(7), Widths(8))
    (field,) = diff.changed[0].fields
    assert len(field.before or "") > 200
    for text in (diff.to_text(width=200), diff.to_markdown().replace("&gt;", ">")):
        assert "widths ...95, 96, 97, 98, 99, 7) -> ...95, 96, 97, 98, 99, 8)" in text


def test_markdown_fits_into_a_comment() -> None:
    def model(eps: float) -> nn.Module:
        root = Run()
        for i in range(250):
            root.add_module(f"{LONG}{i}", nn.LayerNorm(4, eps))
        return root

    printed = ilmconvert.diff(model(1e-5), model(1e-6)).to_markdown()
    shown = printed.count("| changed |")
    assert 59_000 < len(printed.encode()) < 60_500
    assert f"{250 - shown} more changes; --format html shows them all" in printed
    assert "<summary>250 changes</summary>" in printed
    assert printed.endswith("</details>\n")


def test_equal_differences_are_told_once() -> None:
    diff = ilmconvert.convert(Small(width=32), bn_to="group", num_groups=8).diff()
    for text in (diff.to_text(), diff.to_markdown()):
        assert text.count("now groups 8") == 1
        assert text.count("as stem.1") == 3


def test_what_could_not_be_run_or_read_is_told() -> None:
    from tests.models import Failing

    diff = ilmconvert.diff(Failing(), Failing(), example_inputs=torch.zeros(1, 8, 2, 2))
    for text in (diff.to_text(), diff.to_summary(), diff.to_markdown()):
        assert "run for shapes and counts: RuntimeError: no forward today" in text
    why = " ".join(f"reason-{i}" for i in range(200))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Failing, "forward", lambda self, x: (_ for _ in ()).throw(RuntimeError(why)))
        diff = ilmconvert.diff(Failing(), Failing(), example_inputs=torch.zeros(1, 8, 2, 2))
    for text in (diff.to_text(), diff.to_summary(), diff.to_markdown()):
        assert f"RuntimeError: {why}" in " ".join(text.split())
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
