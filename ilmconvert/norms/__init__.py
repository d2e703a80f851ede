"""The norms that can be converted: one registry, one file per family."""

from ilmconvert.norms import batch, group, huggingface, instance, layer, rms, unsupported  # noqa: F401  (they register themselves)
from ilmconvert.norms.build import build_ilm
from ilmconvert.norms.registry import Entry, NormHandler, Refusal, class_name, entries, find, register
from ilmconvert.norms.spec import NormSpec

__all__ = [
    "Entry",
    "NormHandler",
    "NormSpec",
    "Refusal",
    "build_ilm",
    "class_name",
    "entries",
    "find",
    "register",
]
