"""Read weights into a model: safetensors, or torch files without executing anything in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor, nn

from ilmconvert.errors import CheckpointError, NotFoundError
from ilmconvert.wording import brief, one_line, some

__all__ = ["check_keys", "load_weights", "read_state_dict"]


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """The state dict in a checkpoint file.

    timm reads it: safetensors by suffix, otherwise ``torch.load(weights_only=True)``; ``state_dict``, ``model`` and
    EMA entries are found, the prefixes of DataParallel and torch.compile are removed.

    Raises:
        NotFoundError: no such file.
        CheckpointError: an unreadable one, or one that holds no tensors by name.
    """
    file = Path(path)
    if not file.is_file():
        found = "a folder" if file.is_dir() else "none" if not file.exists() else "no regular file"
        raise NotFoundError(f"expected a checkpoint file at {str(file)!r}, found {found}")
    from timm.models import load_state_dict

    try:
        state: Any = load_state_dict(str(file), weights_only=True)
    except Exception as error:
        if file.suffix != ".safetensors" and _is_safetensors(file):
            told = f"expected a torch file at {str(file)!r}, found safetensors; rename it to end in .safetensors"
            raise CheckpointError(told) from error
        raise CheckpointError(
            f"expected a safetensors file (.safetensors) or a torch file of plain tensors at {str(file)!r}, but "
            f"it is none or damaged: {_cause(error)}"
        ) from error
    if not isinstance(state, dict) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        raise CheckpointError(f"expected tensors by name in {str(file)!r}, got {_told(state)}")
    return state


def _is_safetensors(file: Path) -> bool:
    try:
        with safe_open(file, "pt"):
            return True
    except Exception:
        return False


def _cause(error: Exception) -> str:
    """What an error says, without the advice to execute what the file holds (weights_only=False): no option here."""
    return ". ".join(part for part in brief(error, 1000).split(". ") if "weights_only=False" not in part)[:300]


def _told(state: Any) -> str:
    """What a file holds instead of a state dict, and how to get at one inside of it."""
    if not isinstance(state, dict):
        return type(state).__name__
    inside = [
        k for k, v in state.items() if isinstance(v, dict) and v and all(isinstance(t, Tensor) for t in v.values())
    ]
    hint = f"; save the entry by itself: torch.save(torch.load(file)[{inside[0]!r}], new_file)" if inside else ""
    return f"a dict of {', '.join(map(repr, list(state)[:5])) or 'nothing'}{hint}"


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Load a checkpoint file into ``model``, strictly.

    Raises:
        CheckpointError: unreadable, or keys or shapes that do not fit, named.
    """
    state = read_state_dict(path)
    given = {k for k in model.state_dict() if k in state or not k.endswith(".num_batches_tracked")}  # as torch does
    try:
        check_keys({k: v for k, v in model.state_dict().items() if k in given}, state, str(path))
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}. Build the model as the saved one was (--model-arg num_classes=N, say)"
        ) from None
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise CheckpointError(
            f"expected dense tensors with values in {str(path)!r}, but they do not load: {one_line(error, 600)}"
        ) from error


def check_keys(wanted: dict[str, Tensor], given: dict[str, Tensor], where: str) -> None:
    """Raise unless both have the same names and shapes.

    Raises:
        CheckpointError: naming what is missing, unexpected or of another shape.
    """
    problems = []
    for title, names in (
        ("missing", [k for k in wanted if k not in given]),
        ("unexpected", [k for k in given if k not in wanted]),
        (
            "of another shape",
            [
                f"{k} {tuple(v.shape)} instead of {tuple(wanted[k].shape)}"
                for k, v in given.items()
                if k in wanted and v.shape != wanted[k].shape
            ],
        ),
    ):
        if names:
            problems.append(f"{title}: {some(names, 4)}")
    if problems:
        prefix = next((k[: -len(w)] for w in list(wanted)[:1] for k in given if k.endswith(f".{w}")), "")
        hint = f". Its names begin with {prefix!r}: remove that from them" if prefix else ""
        raise CheckpointError(f"the weights in {where!r} do not fit the model; {'; '.join(problems)}{hint}")
