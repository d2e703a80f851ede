"""Swap the normalization layers of any PyTorch model for ILM-Norm without losing the pretrained weights.

>>> import ilmconvert, timm
>>> conversion = ilmconvert.convert(timm.create_model("test_vit"))
>>> conversion.report.exact
True
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ilmconvert.timm_entry import when_timm_is_imported

if TYPE_CHECKING:
    from ilmconvert import checkpoint, errors, images, metrics, nn, norms
    from ilmconvert.calibration import Calibration, calibrate
    from ilmconvert.checkpoint import load, load_conversion
    from ilmconvert.comparison import GraphDiff, diff
    from ilmconvert.conversion import Conversion, apply_plan, convert, convert_, inspect
    from ilmconvert.options import ConvertOptions
    from ilmconvert.plan import Plan
    from ilmconvert.report import Report
    from ilmconvert.training import RecoverOptions, Recovery, parameter_groups, recover
    from ilmconvert.verification import verify

__version__ = "0.1.0"

__all__ = [
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
]

_HOME = {
    "Calibration": "calibration",
    "Conversion": "conversion",
    "ConvertOptions": "options",
    "GraphDiff": "comparison",
    "Plan": "plan",
    "RecoverOptions": "training",
    "Recovery": "training",
    "Report": "report",
    "apply_plan": "conversion",
    "calibrate": "calibration",
    "convert": "conversion",
    "convert_": "conversion",
    "diff": "comparison",
    "inspect": "conversion",
    "load": "checkpoint",
    "load_conversion": "checkpoint",
    "parameter_groups": "training",
    "recover": "training",
    "verify": "verification",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that ``import ilmconvert`` costs nothing."""
    if name in _HOME:
        value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
        globals()[name] = value
        return value
    if name in __all__:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


when_timm_is_imported()
