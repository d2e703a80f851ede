"""Comparing two models: read each as plain data, align them node by node, tell what changed, draw it."""

from ilmconvert.comparison.compare import diff
from ilmconvert.comparison.nodes import ModelGraph, Node, TensorInfo, Totals
from ilmconvert.comparison.value import FieldChange, GraphDiff, Numbers, NumericsRun, Row

__all__ = [
    "FieldChange",
    "GraphDiff",
    "ModelGraph",
    "Node",
    "Numbers",
    "NumericsRun",
    "Row",
    "TensorInfo",
    "Totals",
    "diff",
]
