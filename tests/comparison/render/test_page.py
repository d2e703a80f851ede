"""The page without a browser: self-contained, its policy fits it, nothing in it can end what it stands in."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser

import pytest

from ilmconvert.comparison import GraphDiff
from ilmconvert.comparison.render.html import page_data
from tests.comparison.models import HOSTILE, every_kind, hostile_diff


class Reader(HTMLParser):
    """Collects elements and their text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None], str]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs), ""))

    def handle_endtag(self, tag: str) -> None:
        self.found.append(("", {}, ""))

    def handle_data(self, data: str) -> None:
        if self.found:
            tag, attributes, text = self.found[-1]
            self.found[-1] = (tag, attributes, text + data)

    def all(self, tag: str) -> list[tuple[dict[str, str | None], str]]:
        return [(a, t) for name, a, t in self.found if name == tag]


@pytest.mark.parametrize("make", [every_kind, hostile_diff])
def test_policy_lets_exactly_the_pages_own_style_and_script_run(make: object) -> None:
    page = Reader(make().to_html())  # type: ignore[operator]
    (policy,) = [a["content"] or "" for a, _ in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    assert "unsafe" not in policy
    assert "http" not in policy
    (style,) = [text for _, text in page.all("style")]
    (script,) = [text for a, text in page.all("script") if "type" not in a]
    for name, text in (("style-src", style), ("script-src", script)):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert rules[name] == f"'sha256-{digest}'"


@pytest.mark.parametrize("make", [every_kind, hostile_diff])
def test_nothing_is_fetched_and_nothing_hostile_is_markup(make: object) -> None:
    text = make().to_html()  # type: ignore[operator]
    page = Reader(text)
    assert not [a for _, a, _ in page.found if {"src", "srcset", "action", "style", "onclick", "onerror"} & set(a)]
    assert [a["href"] for _, a, _ in page.found if "href" in a] == ["data:,"]
    assert not re.search(r"@import|url\((?!#)|https?://(?!www\.w3\.org/2000/svg)", text)
    assert len(page.all("script")) == 2
    assert not page.all("img")
    assert "<script>alert" not in text


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_faint_text_can_be_read(theme: int) -> None:
    """WCAG's contrast, of 4.5 and more on everything that it may stand on."""
    (style,) = [text for _, text in Reader(every_kind().to_html()).all("style")]
    colours = dict(re.findall(r"--([\w-]+): (#\w{6});", style.split("}")[theme]))

    def luminance(name: str) -> float:
        parts = [int(colours[name][i : i + 2], 16) / 255 for i in (1, 3, 5)]
        red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    for ground in ("page", "panel", "hover", "select", *(n for n in colours if n.endswith("-bg"))):
        dark, light = sorted((luminance("faint"), luminance(ground)))
        assert (light + 0.05) / (dark + 0.05) >= 4.5, ground


def test_the_data_says_what_the_diff_says() -> None:
    diff = hostile_diff()
    (text,) = [t for a, t in Reader(diff.to_html()).all("script") if a.get("type") == "application/json"]
    data = json.loads(text)
    assert data == json.loads(json.dumps(page_data(diff)))
    assert [row["k"] for row in data["rows"] if "k" in row] == [list(row.changes) for row in diff.changed]
    names = {row["y"].get("name", "") for row in data["rows"]}
    assert {name for name in HOSTILE if name.isprintable()} <= names
    assert not any(c in text for c in "<>&\u2028")


def test_equal_nodes_are_stored_once() -> None:
    diff: GraphDiff = every_kind()
    rows = page_data(diff)["rows"]
    for row, found in zip(diff.rows, rows, strict=True):
        assert ("y" in found) == (row.after is not None)
        if row.changes == ("inserted",) or (row.before == row.after == "stem.0"):
            assert "x" not in found
        elif row.changes:
            assert "x" in found
