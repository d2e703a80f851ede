"""Compare an original with its conversion: outputs, shapes, gradients, modes, and whether every new layer runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from ilmconvert.errors import IlmconvertError, UsageError
from ilmconvert.graph import Inputs, example_inputs
from ilmconvert.graph.inputs import check_model, first_tensor
from ilmconvert.graph.shadow import copy_model
from ilmconvert.graph.sites import find_sites, norm_paths
from ilmconvert.nn import ILMNorm
from ilmconvert.norms import Entry, find
from ilmconvert.norms.batch import is_untrained
from ilmconvert.probing import fill_zeros_, immovable_layers, instead_of_forward, layers_read_around, moves
from ilmconvert.wording import brief, plural, some

__all__ = ["Check", "Verification", "relative_difference", "verify"]


@dataclass(frozen=True)
class Check:
    """One question and its answer.

    Attributes:
        name: what was asked.
        passed: whether the answer is good; None where it is only told.
        detail: the figures.
    """

    name: str
    passed: bool | None
    detail: str


@dataclass(frozen=True)
class Verification:
    """All checks of one comparison.

    Attributes:
        checks: in the order they were made.
        relative_difference: largest output difference in evaluation mode, relative to the largest output; nan where the
            original's own outputs are not finite.
    """

    checks: tuple[Check, ...]
    relative_difference: float

    @property
    def passed(self) -> bool:
        """Whether no check failed."""
        return all(check.passed is not False for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return {"passed": self.passed, **asdict(self)}


@torch.inference_mode(False)
@torch.enable_grad()
def verify(
    original: nn.Module, converted: nn.Module, example_inputs: Any = None, *, tolerance: float = 1e-5
) -> Verification:
    """Compare ``converted`` with ``original``; both are left as they are.

    Outputs must agree within ``tolerance`` unless a norm with batch statistics was replaced; then the difference is
    told. Gradients are those of the mean of squares of all outputs, in training mode.

    Args:
        original, converted: the two models.
        example_inputs: a tensor, a tuple or a dict; timm models declare their own size.
        tolerance: largest difference allowed, relative to the largest output.

    Raises:
        UsageError: no inputs are known, or what is given is no model with values.

    Example:
        >>> import ilmconvert, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.LayerNorm(32), torch.nn.Linear(32, 4))
        >>> ilmconvert.verify(model, ilmconvert.convert(model).model, torch.randn(3, 8)).passed
        True
    """
    for model in (original, converted):
        check_model(model)
        _check_values(model)
    inputs = _inputs(original, example_inputs)
    checks = [_modes(original, converted), _norms_left(converted)]
    exact = _exact(original, converted, inputs)
    before = _outputs(copy_model(original).eval(), inputs, "the original")
    probe = copy_model(converted).eval()
    silent = _silent_layers(original, probe, inputs)
    after = _outputs(probe, inputs, "the converted model")
    checks += [_shapes(before, after), silent]
    difference = relative_difference(before, after)
    if not tolerance >= 0:
        raise UsageError(f"expected a tolerance of at least 0, got {tolerance}")
    passed = difference <= tolerance if exact else None
    wanted = f"at most {tolerance:g} asked" if exact else "equality is not expected of batch statistics or mode paper"
    if untrained := sum(map(is_untrained, original.modules())):
        wanted += f"; {plural(untrained, 'norm')} with the running statistics of an untrained network"
    if any(t.is_floating_point() and t.numel() and not t.isfinite().any() for t in before):
        difference = float("nan")
        checks.append(Check("outputs", False, "the original's own are not finite, so there is nothing to compare"))
    else:
        checks.append(Check("outputs", passed, f"relative difference {difference:.2e} ({wanted})"))
    checks += _around(original, probe, inputs)
    checks += [_training(original, converted, inputs, batch) for batch in ("as given", "one sample")]
    return Verification(tuple(checks), difference)


def relative_difference(a: list[Tensor], b: list[Tensor]) -> float:
    """Largest absolute difference over the largest absolute value of ``a``, the worst of all pairs.

    Infinite where shapes or numbers of tensors differ, or values that are not finite are not the same.

    Example:
        >>> relative_difference([torch.tensor([1.0, -4.0])], [torch.tensor([1.0, -3.0])])
        0.25
    """
    if len(a) != len(b):
        return float("inf")
    return max((_difference(x, y) for x, y in zip(a, b, strict=True)), default=0.0)


def _difference(x: Tensor, y: Tensor) -> float:
    if x.shape != y.shape or _kind(x) != _kind(y):
        return float("inf")
    wide = torch.complex128 if x.is_complex() else torch.float64
    x, y = x.to(wide), y.to(wide)
    finite = torch.isfinite(x)
    if not torch.equal(finite, torch.isfinite(y)) or not torch.equal(x[~finite].nan_to_num(), y[~finite].nan_to_num()):
        return float("inf")
    if not finite.any():
        return 0.0
    x, y = x[finite], y[finite]
    return ((x - y).abs().max() / x.abs().max().clamp_min(1e-30)).item()


def _kind(x: Tensor) -> tuple[bool, bool]:
    return x.is_floating_point(), x.is_complex()


def _check_values(model: nn.Module) -> None:
    if (tensor := first_tensor(model)) is not None and tensor.is_meta:
        raise UsageError(f"expected a {type(model).__name__} with values to compare, got one on the meta device")


def _inputs(model: nn.Module, given: Any) -> Inputs:
    inputs = example_inputs(model, given)
    if inputs is None:
        raise UsageError(
            f"expected example_inputs for {type(model).__name__}, which declares no input size; give a tensor "
            "(--input-size 3,224,224 on the command line)"
        )
    return inputs


@torch.no_grad()
def _outputs(model: nn.Module, inputs: Inputs, who: str) -> list[Tensor]:
    try:
        return inputs.outputs(model)
    except Exception as error:
        raise IlmconvertError(
            f"{who} cannot be run on these inputs: {brief(error)}. Give "
            "others that it takes (--input-size; from Python where they are no images)"
        ) from error


def _modes(original: nn.Module, converted: nn.Module) -> Check:
    flags = dict(_flags(converted))
    changed = [name for name, flag in _flags(original) if flags.get(name, flag) != flag]
    return Check("training flags", not changed, ", ".join(changed[:5]) or "as in the original")


def _flags(model: nn.Module) -> Iterator[tuple[str, bool]]:
    return ((name, module.training) for name, module in model.named_modules(remove_duplicate=False))


def _norms_left(converted: nn.Module) -> Check:
    left = [paths[0] for paths in norm_paths(converted).values()]
    layers = sum(isinstance(m, ILMNorm) for m in converted.modules())
    named = f": {some(left, 5)}" if left else ""
    return Check("norms left", None, f"{layers} ILM layers, {len(left)} other norms{named}")


def _exact(original: nn.Module, converted: nn.Module, inputs: Inputs) -> bool:
    """Whether every layer can start with the output of the norm that it replaced."""
    replaced = {name: m for name, m in converted.named_modules(remove_duplicate=False) if isinstance(m, ILMNorm)}
    if replaced.keys() - dict(original.named_modules(remove_duplicate=False)):  # norms that were calls
        calls = (site for site in find_sites(original, inputs).sites if site.call is not None)
        if any(s.spec is not None and not s.spec.preserves for s in calls if s.layer_path in replaced):
            return False
    for module, paths in norm_paths(original).items():
        layer, entry = replaced.get(paths[0]), find(module)
        if layer is None or not isinstance(entry, Entry):
            continue
        if layer.mode == "paper" or not entry.handler.describe(module).preserves:
            return False
    return True


def _shapes(before: list[Tensor], after: list[Tensor]) -> Check:
    a, b = [tuple(t.shape) for t in before], [tuple(t.shape) for t in after]
    if not a:
        return Check("output shapes", False, "no tensors found in the output: there is nothing to compare")
    return Check("output shapes", a == b, f"{a}" if a == b else f"{a} before, {b} after")


def _silent_layers(original: nn.Module, converted: nn.Module, inputs: Inputs) -> Check:
    """ILM layers that never run although the norm they replaced does: the model's code goes around them."""
    layers = {name: m for name, m in converted.named_modules() if isinstance(m, ILMNorm)}
    with _all_that_run() as ran:
        before = _called(copy_model(original).eval(), set(layers), inputs)
    # a closure that a copy cannot take along goes on calling the norm of the model it was made in
    before |= {name for name, m in original.named_modules() if name in layers and m in ran}
    after = _called(converted, set(layers), inputs)
    bypassed = sorted(before - after)
    idle = len(layers) - len(after)
    told = f"{len(after)} of {len(layers)} run" + (f", {idle} idle in evaluation as before" if idle else "")
    return Check("layers run", not bypassed, f"bypassed: {some(bypassed, 5)}" if bypassed else told)


def _around(original: nn.Module, probe: nn.Module, inputs: Inputs) -> list[Check]:
    """Whether all that a layer holds acts through its forward, and each layer can move the output."""
    layers = {name: m for name, m in probe.named_modules() if isinstance(m, ILMNorm)}
    read, still = set(), list(layers)
    fill_zeros_(probe)
    modes = (True, False) if _runs(probe.train(), inputs) else (False,)
    for training in modes:  # evaluation last: that is the mode the probe came in
        probe.train(training)
        read |= set(layers_read_around(probe, layers, inputs))
        still = immovable_layers(probe, {name: layers[name] for name in still}, inputs)
    before = dict(copy_model(original).eval().named_modules(remove_duplicate=False))
    fill_zeros_(before[""])
    lost = [name for name in still if name in before and _moves_output(before[""], before[name], inputs)]
    told = "their scale and shift act through their forward alone"
    can = f"{len(layers) - len(still)} of {len(layers)} can" + (f", idle as before: {some(still, 5)}" if still else "")
    return [
        Check(
            "nothing goes around the layers", not read, f"read by other code: {some(sorted(read), 5)}" if read else told
        ),
        Check("layers move the output", not lost, f"without effect: {some(lost, 5)}" if lost else can),
    ]


def _runs(model: nn.Module, inputs: Inputs) -> bool:
    """Whether there is no error; the checks of training tell of one."""
    with torch.no_grad():
        try:
            inputs(model)
        except Exception:
            return False
    return True


def _moves_output(model: nn.Module, norm: nn.Module, inputs: Inputs) -> bool:
    parameters = list(norm.parameters(recurse=False))

    @torch.no_grad()
    def change() -> None:
        for parameter in parameters:
            parameter.add_(torch.rand_like(parameter) + 0.5)

    return moves(model, inputs, parameters, change)


@contextmanager
def _all_that_run() -> Iterator[set[nn.Module]]:
    """Every module that is called meanwhile, in whatever model."""
    ran: set[nn.Module] = set()
    handle = register_module_forward_pre_hook(lambda module, _: ran.add(module))
    try:
        yield ran
    finally:
        handle.remove()


def _called(model: nn.Module, names: set[str], inputs: Inputs) -> set[str]:
    called: set[str] = set()

    def note(name: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        called.add(name)
        return forward(*args, **kwargs)

    with ExitStack() as stack:
        for name, module in model.named_modules():
            if name in names:
                stack.enter_context(instead_of_forward(module, partial(note, name)))
        _outputs(model, inputs, "the model")
    return called


def _training(original: nn.Module, converted: nn.Module, inputs: Inputs, batch: str) -> Check:
    """Forward and backward in training mode, at the given batch size or with one sample.

    What the original cannot do (a norm left in it needs more than one sample), the conversion need not either.
    """
    name = f"training, {batch}"
    if batch == "one sample":
        inputs = _first_sample(inputs)
    try:
        grads = _gradients(converted, inputs)
    except Exception as error:
        told = brief(error, 200)
        alike = not _trains(original, inputs)
        return Check(name, None if alike else False, f"the original fails too: {told}" if alike else told)
    bad = [n for n, g in grads.items() if not torch.isfinite(g).all()]
    return Check(
        name, not bad, f"gradients of {len(grads)} parameters finite" if not bad else f"not finite: {some(bad, 5)}"
    )


def _gradients(model: nn.Module, inputs: Inputs) -> dict[str, Tensor]:
    """Those of (a copy of) a model's parameters in training mode; it is an error if none comes."""
    model = copy_model(model).train()
    loss = sum(t.float().square().mean() for t in inputs.outputs(model) if t.requires_grad)
    if isinstance(loss, Tensor):
        loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    if not grads and any(p.requires_grad for p in model.parameters()):
        raise RuntimeError("no gradient reaches a parameter")
    return grads


def _trains(model: nn.Module, inputs: Inputs) -> bool:
    try:
        _gradients(model, inputs)
    except Exception:  # whatever it is: the conversion's own error is told
        return False
    return True


def _first_sample(inputs: Inputs) -> Inputs:
    """The inputs cut to one sample: every tensor that is as long as the first one."""
    length = next((len(t) for t in inputs.tensors() if t.ndim), 0)
    return inputs.map(lambda t: t[:1] if t.ndim and len(t) == length else t)
