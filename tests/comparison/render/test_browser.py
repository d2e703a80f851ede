"""The page in a real browser: Chromium, driven by Playwright."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ilmconvert
from ilmconvert.comparison import GraphDiff
from ilmconvert.comparison.nodes import ModelGraph
from tests.comparison.models import HOSTILE, LONG, Other, Small, every_kind, hostile_diff, shifted

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install -e '.[dev]'")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium on the PATH: apt-get install chromium")

ARGUMENTS = [
    *("--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with playwright.sync_playwright() as run:
        profile = str(tmp_path_factory.mktemp("profile"))
        context = run.chromium.launch_persistent_context(
            profile, executable_path=CHROMIUM, args=ARGUMENTS, headless=True, chromium_sandbox=False
        )
        yield context
        context.close()


class Opened:
    """A page that fails its test on any console message of trouble, error or request."""

    def __init__(self, browser: Any, file: Path, *, width: int = 1400, scheme: str = "light") -> None:
        self.trouble: list[str] = []
        self.page = browser.new_page()
        self.page.on("console", lambda m: self.trouble.append(m.text) if m.type in ("error", "warning") else None)
        self.page.on("pageerror", lambda e: self.trouble.append(str(e)))
        own = file.as_uri()
        self.page.on("request", lambda r: None if r.url in (own, "data:,") else self.trouble.append(r.url))
        self.page.set_viewport_size({"width": width, "height": 800})
        self.page.emulate_media(color_scheme=scheme)
        self.page.goto(own)
        self.page.wait_for_selector("html[data-ready]", state="attached")

    def texts(self, selector: str) -> list[str]:
        return [text.strip() for text in self.page.locator(selector).all_text_contents()]

    def selected(self) -> str:
        return self.page.evaluate("state.selected ? pathOf(state.selected.node) : null")

    def __enter__(self) -> Opened:
        return self

    def __exit__(self, *_: object) -> None:
        self.page.close()
        assert self.trouble == []


def numeric() -> GraphDiff:
    torch.manual_seed(0)
    return ilmconvert.diff(Small(), Other(), numerics=torch.randn(1, 3, 8, 8), names=("small", "other"))


def failed() -> GraphDiff:
    diff = every_kind()
    return replace(diff, after=replace(diff.after, run_error=f"RuntimeError: {'a long reason ' * 100}{LONG}"))


def large() -> GraphDiff:
    """Over 2,000 nodes, 1,200 of them changed."""

    def model(eps: float) -> nn.Module:
        def block() -> nn.Module:
            return nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2, eps), nn.ReLU(), nn.LayerNorm(2, eps))

        return nn.Sequential(*(nn.Sequential(*(block() for _ in range(20))) for _ in range(30)))

    return ilmconvert.diff(model(1e-5), model(1e-6))


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    made = {
        "every": every_kind,
        "hostile": hostile_diff,
        "numeric": numeric,
        "large": large,
        "shifted": shifted,
        "failed": failed,
    }
    for name, make in made.items():
        (folder / f"{name}.html").write_text(make().to_html(), encoding="utf-8")
    return {name: folder / f"{name}.html" for name in made}


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [480, 900, 1600])
def test_opens_quietly_and_fits(browser: Any, pages: dict[str, Path], width: int, scheme: str) -> None:
    for file in pages.values():
        with Opened(browser, file, width=width, scheme=scheme) as opened:
            assert opened.page.evaluate("document.documentElement.dataset.theme") == scheme
            assert opened.page.evaluate("document.documentElement.scrollWidth") <= width
            background = opened.page.evaluate("getComputedStyle(document.body).backgroundColor")
            light = sum(map(int, re.findall(r"\d+", background)[:3])) > 384
            assert light == (scheme == "light")
            rows = opened.page.locator("#tree .row:visible")
            assert rows.count() > 3
            assert opened.page.locator("#models").bounding_box()["height"] > 100


def test_shows_both_models_with_what_changed_marked(browser: Any, pages: dict[str, Path]) -> None:
    with Opened(browser, pages["every"]) as opened:
        assert opened.texts("#title") == ["small→other"]
        rows = opened.page.evaluate("tree.shown.filter((e) => e.row).map((e) => [e.row.k, pathOf(e.row.node)])")
        assert [["inserted"], "stem.1"] in rows
        assert [["renamed"], "classifier"] in rows
        row = opened.page.locator(".row", has_text="classifier")
        assert row.locator(".before .name").inner_text() == "head"
        assert row.locator(".after .name").inner_text() == "classifier"
        removed = opened.page.locator(".row.is-removed").first
        assert removed.locator(".before .name").inner_text() == "2"
        assert removed.locator(".after .name").count() == 0
        assert "1 unchanged" in opened.texts(".row.gap")[0]
        assert opened.texts("#shown") == ["12"]


def test_search_filters_and_folds(browser: Any, pages: dict[str, Path]) -> None:
    with Opened(browser, pages["every"]) as opened:
        page = opened.page
        first = page.evaluate("tree.shown.length")
        page.keyboard.press("/")
        page.keyboard.type("BATCHNORM")
        assert page.evaluate("changedRows().map((r) => pathOf(r.node))") == ["stem.2", "blocks.0.norm", "blocks.2.norm"]
        assert opened.texts("#shown") == ["3 of 12"]
        page.keyboard.press("Enter")
        assert opened.selected() == "stem.2"
        page.keyboard.press("/")
        page.keyboard.press("Escape")
        assert opened.texts("#shown") == ["12"]

        page.click("#kind-removed")
        page.click("#kind-renamed")
        assert page.get_attribute("#kind-removed", "aria-pressed") == "false"
        assert page.evaluate("changedRows().every((r) => r.k.includes('changed') || r.k.includes('inserted'))")
        page.click("#kind-removed")
        assert "removed" in page.evaluate("changedRows().map((r) => r.k.join()).join()")

        page.click("#unfold")
        assert page.evaluate("tree.shown.length") == 19
        page.click("#kind-renamed")
        assert page.evaluate("tree.shown.length") == 24
        page.click("#only")
        assert page.evaluate("tree.shown.length") == first
        page.click("#fold")
        assert page.evaluate("tree.shown.filter((e) => e.row && e.row.depth > 1).length") == 0
        page.locator(".row", has_text="stem").locator(".after .twist").click()
        assert page.evaluate("tree.shown.some((e) => e.row && pathOf(e.row.node) === 'stem.1')")
        before = page.evaluate("tree.shown.length")
        page.locator(".row.gap").first.click()
        assert page.evaluate("tree.shown.length") >= before


def test_a_search_leaves_the_folding_as_it_was(browser: Any, pages: dict[str, Path]) -> None:
    shown = "tree.shown.map((e) => e.row ? pathOf(e.row.node) : e.hidden)"
    with Opened(browser, pages["every"]) as opened:
        page = opened.page
        for prepare in ("f", "u", "c"):
            page.keyboard.press(prepare)
            page.evaluate("toggle(ROWS.find((r) => r.node.path === 'blocks'))")
            before = page.evaluate(shown)
            page.keyboard.press("/")
            page.keyboard.type("norm")
            found = page.evaluate("tree.shown.filter((e) => e.row && !e.row.below.length).map((e) => e.row.i)")
            assert found == page.evaluate("ROWS.filter((r) => matches(r) && !r.below.length).map((r) => r.i)")
            page.keyboard.press("Escape")
            assert page.evaluate(shown) == before
        page.keyboard.press("f")
        page.keyboard.press("/")
        page.keyboard.type("blocks.0.norm")
        page.keyboard.press("Enter")
        page.keyboard.press("/")
        page.keyboard.press("Escape")
        assert opened.selected() == "blocks.0.norm"
        assert page.locator("#tree .row.on").count() == 1


def test_folded_blocks_say_what_is_inside(browser: Any, pages: dict[str, Path]) -> None:
    with Opened(browser, pages["every"]) as opened:
        page = opened.page
        assert [text for text in opened.texts("#tree .inside") if text] == []
        page.click("#fold")
        assert opened.texts("#tree .inside") == ["3 changes", "7 changes"]
        page.locator("#tree .row", has_text="stem").click()
        page.keyboard.press("ArrowUp")
        assert page.inner_text("#block-name") == "Graph of (the model)"
        assert opened.texts("#drawing .has-changes text:first-of-type") == ["stem", "blocks"]


def test_keyboard(browser: Any, pages: dict[str, Path]) -> None:
    with Opened(browser, pages["every"]) as opened:
        page = opened.page
        page.focus("#tree")
        assert opened.selected() == "stem.1"
        page.keyboard.press("ArrowDown")
        assert opened.selected() == "stem.2"
        page.keyboard.press("ArrowLeft")
        assert opened.selected() == "stem"
        page.keyboard.press("ArrowLeft")
        assert page.evaluate("state.closed.has(state.selected.i)")
        page.keyboard.press("ArrowRight")
        page.keyboard.press("ArrowRight")  # what is left out
        assert opened.texts("#tree .row.on") == ["⋯1 unchanged"]
        assert page.get_attribute("#tree", "aria-activedescendant") == page.get_attribute("#tree .row.on", "id")
        page.keyboard.press("Enter")
        assert opened.selected() == "stem.0"
        page.keyboard.press("ArrowDown")
        assert opened.selected() == "stem.1"
        page.keyboard.press("End")
        assert opened.selected() == "classifier"
        page.keyboard.press("Home")
        assert opened.selected() == "(the model)"
        found = []
        for _ in range(12):
            page.keyboard.press("n")
            found.append(opened.selected())
        assert len(set(found)) == 12
        page.keyboard.press("p")
        assert opened.selected() == found[-2]
        theme = page.evaluate("document.documentElement.dataset.theme")
        page.keyboard.press("t")
        assert page.evaluate("document.documentElement.dataset.theme") != theme
        active = page.get_attribute("#tree", "aria-activedescendant")
        assert page.locator(f"#{active}").get_attribute("aria-selected") == "true"
        page.keyboard.press("Escape")
        assert page.locator("#tree .on, #tree [aria-selected=true]").count() == 0
        assert page.get_attribute("#tree", "aria-activedescendant") is None
        page.click("#next")
        page.click("#next")
        page.click("#previous")
        assert opened.selected() == "(the model)"


def test_details_and_graph_of_the_selected_block(browser: Any, pages: dict[str, Path]) -> None:
    with Opened(browser, pages["every"]) as opened:
        page = opened.page
        page.locator("#list .item", has_text="blocks.0.norm").click()
        details = page.inner_text("#details")
        for part in (
            "BatchNorm2d → GroupNorm",
            "num_groups",
            "running_var",
            "float32[8]",
            "- blocks.0.norm.running_mean",
            "eps",
        ):
            assert part in details
        assert page.inner_text("#block-name") == "Graph of blocks.0"
        assert set(opened.texts("#drawing .node text:first-of-type")) == {"conv", "norm", "add()", "act", "input"}
        assert page.locator("#drawing .edge").count() == 5
        assert page.locator("#drawing .node.has-norm.is-changed.on").count() == 1
        page.locator("#sides button", has_text="before").click()
        assert "BatchNorm2d" in page.locator("#drawing .node.on").text_content()
        page.locator("#sides button", has_text="after").click()
        assert "→" not in page.locator("#drawing .node.on .kind").text_content()
        page.locator("#drawing .node", has_text="conv").click()
        assert opened.selected() == "blocks.0.conv"
        boxes = page.evaluate(
            "[...document.querySelectorAll('#drawing .node rect')].map((r) => r.getBoundingClientRect())"
        )
        for i, a in enumerate(boxes):
            for b in boxes[:i]:
                apart = (
                    a["right"] <= b["left"]
                    or b["right"] <= a["left"]
                    or a["bottom"] <= b["top"]
                    or b["bottom"] <= a["top"]
                )
                assert apart, "nodes overlap"


def own_edges(graph: ModelGraph, block: str) -> set[tuple[str, str]]:
    """The edges between the children of a block, and from outside of it, as the model itself has them."""

    def child(path: str | None) -> str | None:
        while path is not None and graph.by_path[path].parent != block:
            path = graph.by_path[path].parent
        return path

    ends = ((child(path), child(node.path)) for node in graph.nodes for path in node.inputs)
    return {("input" if a is None else a, b) for a, b in ends if b is not None and a != b}


@pytest.mark.parametrize("side", ["before", "after"])
@pytest.mark.parametrize(("name", "make"), [("every", every_kind), ("shifted", shifted)])
def test_each_sides_graph_is_the_models_own(
    browser: Any, pages: dict[str, Path], name: str, make: Callable[[], GraphDiff], side: str
) -> None:
    graph: ModelGraph = getattr(make(), side)
    script = """(side) => {
        state.side = side;
        return ROWS.filter((r) => r[side]).map((block) => {
            const { nodes, edges } = blockGraph(block);
            const name = (i) => nodes[i].row ? nodes[i].row[side].path : "input";
            const ends = edges.map(([a, b, , back]) => back ? [name(b), name(a)] : [name(a), name(b)]);
            return [block[side].path || "", ends];
        });
    }"""
    with Opened(browser, pages[name]) as opened:
        drawn = dict(opened.page.evaluate(script, side))
    assert set(drawn) == set(graph.by_path)
    assert {path: {tuple(ends) for ends in edges} for path, edges in drawn.items()} == {
        path: own_edges(graph, path) for path in graph.by_path
    }


def test_what_moved_and_same_named_classes_are_told_apart(browser: Any, pages: dict[str, Path]) -> None:
    with Opened(browser, pages["shifted"]) as opened:
        page = opened.page
        assert page.locator(".row.is-moved .before .name").inner_text() == "left.extra"
        assert page.locator(".row.is-moved .after .name").inner_text() == "more"
        page.locator("#list .item", has_text="one.Act → two.Act").click()
        assert "one.Act → two.Act" in page.inner_text("#details")
        assert opened.texts("#tree .row.on .cls") == ["one.Act", "two.Act"]
        page.evaluate("select(ROWS.find((r) => r.node.path === 'right'))")
        assert "one.Act → two.Act" in opened.texts("#drawing .kind")
        page.evaluate("select(ROWS.find((r) => r.node.path === 'left'))")
        assert page.locator("#drawing .edge.removed").count() == 2  # to what moved out of it, and from there


def test_ends_of_long_paths_are_seen(browser: Any, pages: dict[str, Path]) -> None:
    with Opened(browser, pages["hostile"]) as opened:
        inside = """(span) => {
            const { left, right } = span.getBoundingClientRect(), text = span.firstChild.getBoundingClientRect();
            return [text.left < left, text.right <= right + 1];
        }"""
        assert opened.page.locator("#list .item .path").last.evaluate(inside) == [True, True]
        assert opened.page.locator("#details th wbr").count() > 5


def test_prints_all_rows_and_the_header(browser: Any, pages: dict[str, Path]) -> None:
    with Opened(browser, pages["large"], scheme="dark") as opened:
        page = opened.page
        page.emulate_media(media="print")
        page.evaluate("dispatchEvent(new Event('beforeprint'))")
        assert page.locator("#tree .row").count() == page.evaluate("tree.shown.length") > 1000
        last = page.locator("#tree .row").last.bounding_box()
        assert last["y"] + last["height"] <= page.evaluate("document.documentElement.scrollHeight") + 1
        assert page.locator("#title").is_visible()
        assert page.evaluate("document.documentElement.dataset.theme") == "light"
        page.emulate_media(media="screen")
        page.evaluate("dispatchEvent(new Event('afterprint'))")
        assert page.locator("#tree .row").count() < 120


def test_the_chart_navigates(browser: Any, pages: dict[str, Path], tmp_path: Path) -> None:
    with Opened(browser, pages["numeric"]) as opened:
        page = opened.page
        assert page.locator("#chart .bar").count() == page.evaluate("chart.rows.length") == 13
        box = page.locator("#chart").bounding_box()
        page.mouse.click(box["x"] + box["width"] - 3, box["y"] + 40)
        assert opened.selected() == "classifier"
        page.focus("#chart")
        page.keyboard.press("ArrowLeft")
        assert opened.selected() == page.evaluate("pathOf(chart.rows[chart.rows.length - 2].node)")
        assert "relative error" in page.inner_text("#details")
        assert page.locator("#tree .row.on .figure").inner_text() != ""
    with Opened(browser, pages["every"]) as opened:
        assert not opened.page.locator("#strip").is_visible()
    same = Small()
    file = tmp_path / "same.html"
    file.write_text(ilmconvert.diff(same, same, numerics=torch.randn(1, 3, 8, 8)).to_html(), encoding="utf-8")
    with Opened(browser, file) as opened:
        assert opened.texts("#strip-head span")[0] == "All 17 outputs compared are identical"
        assert not opened.page.locator("#chart").is_visible()


def test_hostile_names_are_text(browser: Any, pages: dict[str, Path]) -> None:
    with Opened(browser, pages["hostile"]) as opened:
        page = opened.page
        assert page.locator("img").count() == 0
        assert page.locator("script").count() == 2
        page.click("#unfold")
        names = page.evaluate("ROWS.map((r) => r.node.name)")
        for name in HOSTILE:
            if name.isprintable():
                assert name in names
        for i in page.evaluate("ROWS.filter((r) => r.k.length).map((r) => r.i)"):
            page.evaluate(f"select(ROWS[{i}])")
        assert LONG in page.inner_text("#details h3")
        assert page.evaluate("document.documentElement.scrollWidth") <= 1400
        assert page.title() == '<img src=x onerror=alert(1)> → b\' & "c"'


def test_large_models_open_and_react_within_a_second(browser: Any, pages: dict[str, Path]) -> None:
    with Opened(browser, pages["large"]) as opened:
        page = opened.page
        assert page.evaluate("ROWS.length") > 2000
        assert page.evaluate("changedRows().length") == 1200
        opening = page.evaluate("performance.now() - performance.getEntriesByType('navigation')[0].fetchStart")
        drawn = page.evaluate("performance.getEntriesByName('ready')[0].startTime")
        assert drawn < 1000, opening
        for action in (
            "unfoldAll()",
            "setSearch('29.19')",
            "setSearch('')",
            "foldAll()",
            "select(ROWS[ROWS.length - 1])",
        ):
            script = f"const t = performance.now(); {action}; document.body.offsetHeight; return performance.now() - t"
            took = page.evaluate(f"(() => {{ {script} }})()")
            assert took < 1000, action
        assert page.locator("#tree .row").count() < 120
        page.evaluate("unfoldAll()")
        page.evaluate("tree.scroller.scrollTop = 1e6; tree.window.draw()")
        assert page.evaluate("document.querySelector('#tree .row:last-child').id === `row-${tree.shown.length - 1}`")
