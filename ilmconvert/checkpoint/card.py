"""The short model card of a saved conversion."""

from __future__ import annotations

from ilmconvert.conversion import Conversion
from ilmconvert.sources import Source

__all__ = ["load_call", "model_card"]


def load_call(folder: str, source: Source | None) -> str:
    """The Python that loads a saved folder.

    Example:
        >>> print(load_call("saved", Source("factory", "package.module:factory")))
        ilmconvert.load("saved", trust_factory=True)
    """
    if source is None:
        return f'ilmconvert.load("{folder}", model=the_rebuilt_original)'
    return f'ilmconvert.load("{folder}"{", trust_factory=True" if source.kind == "factory" else ""})'


def model_card(conversion: Conversion, source: Source | None, *, worked_on: bool = False) -> str:
    """Markdown with Hugging Face front matter: what the model is, how to load it, what was converted.

    Args:
        conversion, source: the model, and how its original is built.
        worked_on: it was calibrated or trained since, so that warnings about its start are over.
    """
    rest = "Everything else is the original." if conversion.has_original else "It was trained since."
    report = [line for line in str(conversion.report).splitlines() if not (worked_on and "warning:" in line)]
    name = source.name if source else conversion.plan.model
    front = ["library_name: timm"] if source and source.kind == "timm" else []
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
        f"Chen, CVPR 2019) with ilmconvert. {rest}",
        "",
        "```python",
        "import ilmconvert",
        f"model = {load_call('this folder', source)}",
        "```",
        "",
        "## Report",
        "",
        "```text",
        *report,
        "```",
        "",
    ]
    return "\n".join(lines)
