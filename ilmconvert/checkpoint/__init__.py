"""Save and load conversions, read weights, and take over the paper's authors' checkpoints."""

from ilmconvert.checkpoint.authors import load_authors
from ilmconvert.checkpoint.folder import is_saved, load, load_conversion, save
from ilmconvert.checkpoint.weights import load_weights, read_state_dict

__all__ = ["is_saved", "load", "load_authors", "load_conversion", "load_weights", "read_state_dict", "save"]
