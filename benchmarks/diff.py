"""What a diff costs: time as a ratio to building and converting the model, memory, size of the page, time to react.

``python -m benchmarks.diff``. Each model, with weights, is converted and compared with its original, in a process of
its own, so that its peak memory is its own. The browser's figures need Chromium on the PATH and playwright.
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import peak, write

MODELS = ("resnet50", "vit_large_patch16_224", "efficientnet_b7", "swin_large_patch4_window7_224")
RUNS = 3


def measure(name: str, page: Path) -> dict[str, Any]:
    import timm

    import ilmconvert

    over_building, over_converting = [], []
    memory = 0.0
    for run in range(RUNS):
        start = time.perf_counter()
        model = timm.create_model(name)
        built = time.perf_counter()
        conversion = ilmconvert.convert(model)
        converted = time.perf_counter()
        before = peak()
        diff = conversion.diff()
        done = time.perf_counter()
        memory = memory if run else (peak() - before) / diff.before.totals.parameter_bytes
        over_building.append((done - converted) / (built - start))
        over_converting.append((done - converted) / (converted - built))
    html = diff.to_html()
    page.write_text(html, encoding="utf-8")
    return {
        "model": name,
        "nodes": len(diff.rows),
        "changed": len(diff.changed),
        "time / building": statistics.median(over_building),
        "time / converting": statistics.median(over_converting),
        "memory on top of converting / model": memory,
        "HTML, KB": len(html.encode()) / 1000,
        "JSON, KB": len(json.dumps(diff.to_dict())) / 1000,
    }


def in_browser(page: Path) -> dict[str, Any]:
    """Milliseconds until the page answers, and of the slowest of the reactions to the user."""
    chromium = shutil.which("chromium")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        chromium = None
    if chromium is None:
        return {"ready, ms": "not measured", "slowest reaction, ms": "not measured"}
    arguments = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    actions = ("unfoldAll()", "setSearch('norm')", "setSearch('')", "foldAll()", "select(ROWS[ROWS.length - 1])")
    with tempfile.TemporaryDirectory() as profile, sync_playwright() as run:
        browser = run.chromium.launch_persistent_context(
            profile, executable_path=chromium, args=arguments, chromium_sandbox=False
        )
        tab = browser.new_page()
        tab.goto("about:blank")
        tab.goto(page.as_uri())
        tab.wait_for_selector("html[data-ready]", state="attached")
        ready = tab.evaluate("performance.getEntriesByName('ready')[0].startTime")
        script = (
            "(() => {{ const t = performance.now(); {0}; document.body.offsetHeight; return performance.now() - t }})()"
        )
        slowest = max(tab.evaluate(script.format(action)) for action in actions)
        browser.close()
    return {"ready, ms": ready, "slowest reaction, ms": slowest}


def main() -> None:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in MODELS:
            page = Path(folder) / f"{name}.html"
            command = [sys.executable, "-m", "benchmarks.diff", name, str(page)]
            result = subprocess.run(command, capture_output=True, text=True, check=True)
            rows.append({**json.loads(result.stdout), **in_browser(page)})
    write("diff", rows, note="median of three runs; the memory of the first")


if __name__ == "__main__":
    if len(sys.argv) == 3:
        print(json.dumps(measure(sys.argv[1], Path(sys.argv[2]))))
    else:
        main()
