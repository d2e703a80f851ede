"""The short model card of a saved conversion."""

from __future__ import annotations

from ilmconvert.conversion import Conversion
from ilmconvert.sources import Source

__all__ = ["model_card"]


def model_card(conversion: Conversion, source: Source | None) -> str:
    """Markdown with Hugging Face front matter: what the model is, how to load it, what was converted."""
    name = source.name if source else conversion.plan.model
    front = ["library_name: timm"] if source and source.kind == "timm" else []
    call = 'ilmconvert.load("this folder"' + (")" if source else ", model=the_rebuilt_original)")
    lines = [
        "---",
        "tags:",
        "- ilmconvert",
        "- ilm-norm",
        *front,
        "---",
        "",
        f"# {name}, converted to ILM-Norm",
        "",
        "The normalization layers of this model were replaced by Instance-Level Meta Normalization (Jia, Chen and",
        "Chen, CVPR 2019) with ilmconvert. Everything else is the original.",
        "",
        "```python",
        "import ilmconvert",
        f"model = {call}",
        "```",
        "",
        "## Report",
        "",
        "```text",
        str(conversion.report),
        "```",
        "",
    ]
    return "\n".join(lines)
