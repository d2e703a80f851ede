"""The layers. This package needs torch alone."""

from ilmconvert.nn.functional import Layout, Standardization
from ilmconvert.nn.ilm_norm import ILMNorm, ILMNormAct
from ilmconvert.nn.predictor import MetaPredictor

__all__ = ["ILMNorm", "ILMNormAct", "Layout", "MetaPredictor", "Standardization"]
