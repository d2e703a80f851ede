"""The layer while its predictor says nothing: the base norm with ``weight`` and ``bias``, and nothing else to compute.

A fresh conversion in mode ``preserve`` has two decoders of zeros. As long as no gradient is asked for, the key features
need not be taken then: the output is the base norm's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ilmconvert.nn.functional import Parameters
from ilmconvert.nn.fused import transformed

__all__ = ["is_silent"]


def is_silent(x: Tensor, parameters: Parameters) -> bool:
    """Whether the predictor is known to add nothing here, and nothing is to be learned from it.

    Only on the CPU: on other devices a look at the weights would wait for all work before it. And not with gains: such
    a predictor speaks from the start, and the look would be in vain.
    """
    if (
        parameters.scale_gain is not None
        or torch.compiler.is_compiling()
        or torch.is_grad_enabled()
        or not x.is_cpu
        or transformed(x)
    ):
        return False
    return not (bool(parameters.scale_decoder.any()) or bool(parameters.shift_decoder.any()))
