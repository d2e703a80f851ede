"""Copies of a model: a real one to convert, and a weightless one to look at.

The caller's model is never traced or run itself. Forward code may cache what it sees (a proxy, a shape) on the module;
on a shadow, that is thrown away with it.
"""

from __future__ import annotations

import copy
import copyreg
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.parameter import is_lazy

from ilmconvert.errors import ModelError
from ilmconvert.graph.meta import MetaMode

__all__ = ["copied_together", "copy_model", "fake_mode", "refuse_opaque", "shadow"]


def refuse_opaque(model: nn.Module) -> None:
    """Raise for what cannot be looked into or replaced: TorchScript, compiled modules, DDP, parameters without a shape.

    Raises:
        ModelError: naming the first such module or parameter.
    """
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise ModelError(
                f"expected Python modules, got TorchScript at {name!r}, whose norms cannot be seen; convert the model "
                "before scripting it"
            )
        if (kind := type(module)).__name__ == "OptimizedModule" and kind.__module__.startswith("torch._dynamo"):
            raise ModelError(
                f"expected a model that is not compiled yet, got torch.compile's module at {name!r}; convert what was "
                "compiled (its _orig_mod), then compile the result"
            )
        if isinstance(module, nn.parallel.DistributedDataParallel):
            raise ModelError(
                f"expected a model that is not wrapped yet, got DistributedDataParallel at {name!r}, which goes on "
                "with the parameters it was made for; convert its .module, then wrap the result"
            )
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            raise ModelError(
                f"expected initialised parameters, got an uninitialised one at {name!r} (a lazy module): its width is "
                "not known yet; run one forward pass, then convert"
            )


def copy_model(model: nn.Module) -> nn.Module:
    """A deep copy, modes and hooks included.

    Raises:
        ModelError: the model cannot be deep-copied.
    """
    return _deepcopy(model, {})


def copied_together(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """Deep copies of several modules, in which parameters that they share stay shared."""
    return list(cast("nn.ModuleList", copy_model(nn.ModuleList(modules))))


def fake_mode() -> FakeTensorMode:
    """A mode of torch in which tensors are fake, whatever forward code makes them of."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def shadow(model: nn.Module, mode: FakeTensorMode | MetaMode | None = None) -> nn.Module:
    """A deep copy whose parameters and buffers are fake, or on the meta device: shapes and dtypes without memory."""
    mode = mode or fake_mode()
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        fake = mode.from_tensor(tensor.detach())
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(fake, requires_grad=tensor.requires_grad) if is_parameter else fake
    result = _deepcopy(model, memo)
    for module in result.modules():
        _drop_user_hooks(module)
    return result


def _drop_user_hooks(module: nn.Module) -> None:
    """The user's hooks must not see fake tensors; torch's own (pruning, weight_norm) compute weights and stay."""
    for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
        hooks = vars(module).get(name, {})
        for key, hook in list(hooks.items()):
            home = getattr(hook, "__module__", None) or type(hook).__module__
            if not home.startswith("torch."):
                del hooks[key]


def _deepcopy(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    for tensor in _computed_tensors(model):
        memo.setdefault(id(tensor), tensor.detach().clone())
    try:
        _copy_modules(model, memo)
        result: nn.Module = copy.deepcopy(model, memo)
        _copy_modes(model, result)
    except Exception as error:
        raise ModelError(
            f"expected a model that copy.deepcopy can copy, got {type(model).__name__}, which fails with: {error}. "
            "Remove what cannot be copied (locks, open files, generators) and convert again"
        ) from error
    if shared := set(result.modules()) & set(model.modules()):
        names = ", ".join(sorted({type(m).__name__ for m in shared}))
        raise ModelError(
            f"expected copy.deepcopy to copy every module, but it returns the model's own {names} (a __deepcopy__ that "
            "copies nothing?); converting would change the model itself"
        )
    return result


def _copy_modules(model: nn.Module, memo: dict[int, Any]) -> None:
    """Put copies of the modules into the ``memo`` of a deep copy, to the same effect in a third of its time.

    Most of what a module holds is empty tables. A class that says itself how it is copied is left to deepcopy.
    """
    states = {}
    for module in model.modules():
        state = _plain_state(module)
        if state is not None:
            memo[id(module)], states[module] = type(module).__new__(type(module)), state
    for module in reversed(states):  # children first
        memo[id(module)].__setstate__({name: _copied(value, memo) for name, value in states[module].items()})


def _copy_modes(model: nn.Module, result: nn.Module) -> None:
    """Copies of GraphModules come in training mode, whatever mode they had."""
    copies = dict(result.named_modules())
    for path, module in model.named_modules():
        if isinstance(module, fx.GraphModule):
            for name, part in module.named_modules(prefix=path):
                if name in copies:  # what the graph does not use is not copied
                    copies[name].training = part.training


def _plain_state(module: nn.Module) -> dict[str, Any] | None:
    """What deepcopy would copy of a module and hand to ``__setstate__``; None if it would do anything else."""
    if hasattr(module, "__deepcopy__") or type(module) in copyreg.dispatch_table:
        return None
    reduced: Any = module.__reduce_ex__(4)
    if len(reduced) < 3 or reduced[:2] != (copyreg.__newobj__, (type(module),)) or any(reduced[3:]):  # type: ignore[attr-defined]
        return None
    return reduced[2] if type(reduced[2]) is dict else None


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    kind = type(value)
    if value is None or kind in (bool, int, float, str):
        return value
    if kind in (dict, OrderedDict, set) and not value:
        return memo.setdefault(id(value), kind())
    if kind is dict and id(value) not in memo and all(type(key) is str for key in value):
        made = memo[id(value)] = {}
        made.update((key, _copied(inner, memo)) for key, inner in value.items())
        return made
    if kind is Tensor and id(value) not in memo and _is_plain(value):
        return _cloned(value, memo)
    return copy.deepcopy(value, memo)


def _is_plain(tensor: Tensor) -> bool:
    """Whether it has all of its storage in order, and nothing that a clone would not have."""
    if not tensor.is_cpu or tensor.layout is not torch.strided or tensor.is_quantized or tensor.requires_grad:
        return False
    whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
    return whole and not (tensor.is_conj() or tensor.is_neg() or vars(tensor) or tensor.grad is not None)


def _cloned(buffer: Tensor, memo: dict[int, Any]) -> Tensor:
    """What deepcopy makes of a buffer, in a tenth of its time; tensors that share memory share that of the copy."""
    storages = memo.setdefault("torch", {})  # type: ignore[call-overload]  # torch's own table of copied storages
    if (key := buffer.untyped_storage()._cdata) in storages:
        return copy.deepcopy(buffer, memo)
    clone = memo[id(buffer)] = buffer.clone()
    storages[key] = clone.untyped_storage()
    return clone


def _computed_tensors(model: nn.Module) -> Iterator[Tensor]:
    """Plain attributes that hold the result of a computation, which deepcopy refuses (torch.nn.utils.weight_norm)."""
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and not value.is_leaf:
                yield value
