"""Training converted models: parameter groups, and recovery of what a conversion lost."""

from ilmconvert.training.groups import parameter_groups
from ilmconvert.training.options import RecoverOptions
from ilmconvert.training.recovery import recover
from ilmconvert.training.result import Evaluation, Recovery, RecoveryReport

__all__ = ["Evaluation", "RecoverOptions", "Recovery", "RecoveryReport", "parameter_groups", "recover"]
