"""What is kept of a recovery beside its model: log, account and curve."""

from __future__ import annotations

import importlib.util
import io
from typing import TYPE_CHECKING

from ilmconvert.errors import IlmconvertError
from ilmconvert.jsonable import to_json
from ilmconvert.training.result import RecoveryReport

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["curve", "need_matplotlib", "records"]


def need_matplotlib() -> None:
    """Raise if the curve cannot be drawn; to be asked before the work.

    Raises:
        IlmconvertError: ``matplotlib`` is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise IlmconvertError("the curve needs matplotlib, which is not installed; pip install 'ilmconvert[train]'")


def records(report: RecoveryReport) -> dict[str, bytes]:
    """Files by name: every measurement as CSV and JSON lines, the account in JSON, the curve as a picture.

    Raises:
        IlmconvertError: ``matplotlib`` is not installed.
    """
    picture = io.BytesIO()
    curve(report).savefig(picture, format="png", dpi=120)
    return {
        "recover.csv": report.to_csv().encode(),
        "recover.jsonl": report.to_jsonl().encode(),
        "recover.json": (to_json(report.to_dict()) + "\n").encode(),
        "recover.png": picture.getvalue(),
    }


def curve(report: RecoveryReport) -> Figure:
    """Agreement (or accuracy) against steps, with KL (or cross-entropy) on a second axis.

    Raises:
        IlmconvertError: ``matplotlib`` is not installed.
    """
    need_matplotlib()
    from matplotlib.figure import Figure

    steps = [e.step for e in report.evaluations]
    name, second = report.start.measured.FIGURES
    labels = {"kl": "KL(original ‖ converted), nats", "loss": "cross-entropy, nats"}
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.axhline(100 * report.start.top1, color="0.7", linestyle="--", linewidth=1)
    axes.plot(steps, [100 * e.top1 for e in report.evaluations], "o-", color="tab:blue", markersize=3)
    axes.plot(report.best.step, 100 * report.best.top1, "o", color="tab:blue", markersize=8)
    won = f"{100 * report.start.top1:.1f} % → {100 * report.best.top1:.1f} %"
    axes.set(xlabel="step", title=f"{name} on {report.held_out} held-out images: {won}")
    axes.set_ylabel(f"top-1 {name}, %", color="tab:blue")
    other = axes.twinx()
    other.plot(steps, [e.distance for e in report.evaluations], color="tab:orange", linewidth=1)
    other.set_ylabel(labels[second], color="tab:orange")
    other.set_ylim(bottom=0)
    return figure
