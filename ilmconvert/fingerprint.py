"""Tell whether weights are the ones they were, without keeping or reading all of them."""

from __future__ import annotations

from collections.abc import Callable
from hashlib import sha256

import torch
from torch import Tensor, nn

__all__ = ["fingerprint"]

_SAMPLES = 1024


def fingerprint(model: nn.Module, *, leave_out: Callable[[nn.Module], bool] = lambda _: False) -> str | None:
    """A short text that changes when training changes the model's weights.

    Of each parameter and saved buffer it takes name, dtype, shape and 1,024 values spread over it, so that a large
    model costs no more than a small one. Training that changes nothing but a few rows of a table of embeddings, all
    else frozen and without weight decay, may go unnoticed.

    Args:
        model: any model.
        leave_out: modules whose tensors do not count.

    Returns:
        16 hexadecimal digits; None where there are no values (the meta device, sparse or quantized tensors).

    Example:
        >>> layer = nn.Linear(3, 2)
        >>> before = fingerprint(layer)
        >>> with torch.no_grad():
        ...     layer.bias += 1e-6
        >>> fingerprint(layer) == before, fingerprint(layer, leave_out=lambda m: m is layer)
        (False, 'e3b0c44298fc1c14')
    """
    left_out = {path for path, module in model.named_modules(remove_duplicate=False) if leave_out(module)}
    digest = sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if not _inside(name, left_out) and isinstance(tensor, Tensor):
            if tensor.is_meta or tensor.is_quantized or tensor.layout is not torch.strided:
                return None
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(_sample(tensor))
    return digest.hexdigest()[:16]


def _inside(name: str, paths: set[str]) -> bool:
    """Whether a tensor of that name belongs to one of the modules or to what is inside of them."""
    while name:
        name = name.rpartition(".")[0]
        if name in paths:
            return True
    return False


def _sample(tensor: Tensor) -> bytes:
    flat = tensor.detach().reshape(-1)
    values = flat[:: max(flat.numel() // _SAMPLES, 1)].cpu()
    values = values.clone()  # numpy's hold would keep the model's from being resized
    return values.view(torch.uint8).numpy().tobytes()
