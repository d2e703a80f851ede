"""The facade: inspect a model, convert it, and what one can do with the result."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

from ilmconvert.collector import collector_paused
from ilmconvert.errors import ModelError, UsageError
from ilmconvert.fingerprint import fingerprint
from ilmconvert.graph import find_sites
from ilmconvert.graph.inputs import example_inputs as resolve_inputs
from ilmconvert.graph.inputs import first_tensor
from ilmconvert.graph.shadow import copied_together, copy_model
from ilmconvert.graph.tracer import TraceError, trace
from ilmconvert.nn import ILMNorm, ILMNormAct
from ilmconvert.options import ConvertOptions, Progress
from ilmconvert.plan import Decision, Plan, make_plan
from ilmconvert.redirection import get_module, put_calls_back_
from ilmconvert.report import Report
from ilmconvert.rewrite import replace_modules_, rewrite
from ilmconvert.sources import Source

if TYPE_CHECKING:
    from ilmconvert.comparison import GraphDiff

__all__ = ["Conversion", "apply_plan", "convert", "convert_", "inspect", "size_of"]


@dataclass(frozen=True)
class Conversion:
    """A converted model and everything needed to explain, save and undo it.

    Attributes:
        model: the converted model: same class as the original, ready to fine-tune.
        report: the account of every norm.
        originals: the norms that were replaced, by canonical path.
        source: how the original can be built again; None if that is not known.
        fingerprint: of everything but the ILM layers, as it was when converted; None if that is not known.
        parameters: how many the model had when it was converted or loaded; a factory makes one of that size.

    Example:
        >>> import ilmconvert, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.LayerNorm(16))
        >>> conversion = ilmconvert.convert(model)
        >>> conversion
        <Conversion of Sequential: 1 norm converted, 0 skipped>
        >>> type(conversion.model[1]).__name__, type(conversion.revert()[1]).__name__
        ('ILMNorm', 'LayerNorm')
    """

    model: nn.Module
    report: Report
    originals: dict[str, nn.Module]
    source: Source | None = None
    fingerprint: str | None = None
    parameters: int = 0

    def __repr__(self) -> str:
        return f"<Conversion of {str(self.report).splitlines()[0]}>"

    @property
    def plan(self) -> Plan:
        """The decisions that were carried out."""
        return self.report.plan

    def graph_module(self) -> fx.GraphModule:
        """A torch.fx GraphModule of (a copy of) the converted model, each ILM layer one node.

        Raises:
            ModelError: torch.fx cannot follow the model as a whole.
        """
        model = copy_model(self.model)
        try:
            return fx.GraphModule(model, trace(model), type(model).__name__)
        except TraceError as error:
            raise ModelError(
                f"expected a model that torch.fx can trace as a whole, but {type(model).__name__} stops it: {error}. "
                "The converted model itself is not affected"
            ) from error

    @torch.inference_mode(False)
    def revert(self) -> nn.Module:
        """A copy of the model with the original norms back; everything else keeps its present weights.

        Straight after :func:`convert`, its state dict is that of the original, bit for bit.
        """
        current = self.current()
        model, *norms = copied_together([current.model, *current.originals.values()])
        originals = dict(zip(current.originals, norms, strict=True))
        replacements: dict[str, nn.Module] = {}
        others = (m for m in model.modules() if not isinstance(m, ILMNorm))
        shared = {parameter for module in others for parameter in module.parameters(recurse=False)}
        for decision in current.plan.converted:
            paths = [path for path in _layer_paths(decision) if isinstance(_module_at(model, path), ILMNorm)]
            norm, layer = originals[decision.path], get_module(model, paths[0])
            norm.train(layer.training)
            _follow_(norm, layer, current.originals[decision.path])
            for name, tensor in layer._parameters.items():
                if tensor in shared and isinstance(norm._parameters.get(name), nn.Parameter):
                    norm._parameters[name] = tensor  # tied to it from outside, and so it stays
            if isinstance(layer, ILMNormAct):
                norm.drop, norm.act = layer.drop, layer.act
            if decision.site.call is None:
                replacements.update(dict.fromkeys(paths, norm))
        put_calls_back_(model, current.plan, originals)
        return replace_modules_(model, replacements)

    @property
    def has_original(self) -> bool:
        """Whether nothing but the ILM layers is known to have changed since, so that :meth:`revert` is the original."""
        return self.fingerprint is not None and _fingerprint(self.model) == self.fingerprint

    def original(self) -> nn.Module:
        """As :meth:`revert`, where that gives the original: nothing but the ILM layers was changed since.

        Raises:
            ModelError: other weights were changed, or it is not known whether they were.
        """
        if self.has_original:
            return self.revert()
        state = "not known to be" if self.fingerprint is None else "not"
        raise ModelError(
            f"expected only the ILM layers of this {self.plan.model} to have changed since its conversion, so that the "
            f"original can be had from it; the other weights are {state} the original's. "
            "Give the original itself (--teacher on the command line)"
        )

    def current(self) -> Conversion:
        """This conversion as the model stands now, without layers replaced since (a head that was reset)."""
        gone = {
            d.path
            for d in self.plan.converted
            if not any(isinstance(_module_at(self.model, path), ILMNorm) for path in _layer_paths(d))
        }
        if not gone:
            return self
        reason = "the layer was replaced after the conversion"
        decisions = tuple(
            replace(d, action="skip", target=None, code="replaced", reason=reason) if d.path in gone else d
            for d in self.plan.decisions
        )
        report = replace(self.report, plan=replace(self.plan, decisions=decisions))
        originals = {path: norm for path, norm in self.originals.items() if path not in gone}
        return replace(self, report=report, originals=originals)

    def diff(self, *, example_inputs: Any = None, numerics: Any = None) -> GraphDiff:
        """What the conversion changed in the model as it is now; see :func:`ilmconvert.diff`."""
        from ilmconvert.comparison import diff

        name = type(self.model).__name__
        names = (name, f"{name} converted")
        return diff(self.revert(), self.model, example_inputs=example_inputs, numerics=numerics, names=names)

    def save(
        self,
        path: str | Path,
        *,
        factory: str | None = None,
        model_args: dict[str, Any] | None = None,
        force: bool = False,
    ) -> Path:
        """Save as a folder; see :func:`ilmconvert.checkpoint.save`."""
        from ilmconvert.checkpoint import save

        return save(self, path, factory=factory, model_args=model_args, force=force)


def inspect(
    model: nn.Module, options: ConvertOptions | None = None, *, example_inputs: Any = None, **fields: Any
) -> Report:
    """What :func:`convert` would do; nothing is changed or built.

    Args:
        model: any module.
        options: how to convert, or its fields as keywords.
        example_inputs: what to call the model with: a tensor, a tuple, or a dict of keyword arguments.

    Returns:
        The report that a conversion would have.

    Raises:
        UsageError: contradictory options, or a filter that matches nothing.
        ModelError: a lazy model, or one that cannot be copied.

    Example:
        >>> import ilmconvert, torch
        >>> report = ilmconvert.inspect(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 1), torch.nn.BatchNorm2d(8)))
        >>> [(d.path, d.norm, d.action) for d in report.plan.decisions]
        [('1', 'BatchNorm2d', 'convert')]
    """
    plan = _plan(model, options, example_inputs, fields)
    norms = {d.path: get_module(model, d.path) for d in plan.converted if d.site.call is None}
    return Report.of(plan, size_of(model), norms)


def convert(
    model: nn.Module,
    options: ConvertOptions | None = None,
    *,
    example_inputs: Any = None,
    progress: Progress | None = None,
    **fields: Any,
) -> Conversion:
    """Replace the norms of a copy of ``model`` by ILM layers.

    Group, Layer, Instance and RMS norms start with the same output, to rounding. BatchNorm layers start close to their
    evaluation output, without data. Where a layer cannot start so, the report warns.

    Args:
        model: any module; it is left as it is.
        options: how to convert, or its fields as keywords (``bn_to="group"``, ``exclude="head.*"``, ...).
        example_inputs: what to call the model with: a tensor, a tuple, or a dict of keyword arguments. timm models
            declare their own. Only its shapes are looked at, never run on real weights.
        progress: called with (what, done, total).

    Raises:
        UsageError: contradictory options, or a filter that matches nothing.
        ModelError: a lazy model, or one that cannot be copied.

    Example:
        >>> import ilmconvert, torch
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 32, 3), torch.nn.GroupNorm(4, 32), torch.nn.ReLU())
        >>> conversion = ilmconvert.convert(model)
        >>> x = torch.randn(2, 3, 8, 8)
        >>> torch.allclose(conversion.model(x), model(x), atol=1e-5)
        True
        >>> len(conversion.report.converted), conversion.report.skipped
        (1, ())
    """
    return _carry_out(model, _plan(model, options, example_inputs, fields), progress)


def convert_(
    model: nn.Module,
    options: ConvertOptions | None = None,
    *,
    example_inputs: Any = None,
    progress: Progress | None = None,
    **fields: Any,
) -> Conversion:
    """As :func:`convert`, on the model itself: no weight is copied but those of the norms.

    An error leaves the model as it was.

    Raises:
        UsageError: as :func:`convert`, or the model is itself a norm, which cannot become another object.
        ModelError: as :func:`convert`.

    Example:
        >>> import ilmconvert, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.LayerNorm(16))
        >>> conversion = ilmconvert.convert_(model)
        >>> conversion.model is model, type(model[1]).__name__
        (True, 'ILMNorm')
    """
    plan = _plan(model, options, example_inputs, fields)
    if any("" in decision.site.paths for decision in plan.converted):
        raise UsageError(f"expected a model with norms in it, got a {type(model).__name__}; use ilmconvert.convert")
    return _carry_out(model, plan, progress, in_place=True)


def apply_plan(model: nn.Module, plan: Plan, *, progress: Progress | None = None) -> Conversion:
    """Carry out a plan made earlier, edited or not, on the model it was made for or one built alike.

    Args:
        model: the model; it is left as it is.
        plan: what to do with each of its norms.
        progress: called with (what, done, total).

    Raises:
        UsageError: no plan.
        PlanError: the plan does not fit the model.

    Example:
        >>> import ilmconvert, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.LayerNorm(16))
        >>> plan = ilmconvert.inspect(model).plan
        >>> ilmconvert.apply_plan(model, ilmconvert.Plan.from_json(plan.to_json()))
        <Conversion of Sequential: 1 norm converted, 0 skipped>
    """
    if not isinstance(plan, Plan):
        raise UsageError(f"expected a Plan (Plan.from_json reads one), got {type(plan).__name__}")
    return _carry_out(model, plan, progress)


@collector_paused()
def _plan(model: nn.Module, options: ConvertOptions | None, example_inputs: Any, fields: dict[str, Any]) -> Plan:
    given: object = model
    if not isinstance(given, nn.Module):
        got = repr(given) if isinstance(given, (str, type)) else type(given).__name__
        raise UsageError(f"expected a torch.nn.Module, got {got}; build it first (timm.create_model(name))")
    wanted = ConvertOptions.of(options, fields)
    search = find_sites(model, resolve_inputs(model, example_inputs, make=torch.empty))
    return make_plan(search, wanted, type(model).__name__)


@torch.inference_mode(False)  # inference tensors could not be trained
@collector_paused()
def _carry_out(model: nn.Module, plan: Plan, progress: Progress | None, *, in_place: bool = False) -> Conversion:
    done, total, parameters = 0, len(plan.converted), size_of(model)

    def step(decision: object) -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress("converting", done, total)

    converted, originals = rewrite(model, plan, in_place=in_place, on_site=step)
    told = Report.of(plan, parameters, originals)
    return Conversion(converted, told, originals, Source.of(model), _fingerprint(converted), size_of(converted))


def size_of(model: nn.Module) -> int:
    """How many parameters a model has."""
    return sum(p.numel() for p in model.parameters())


def _fingerprint(model: nn.Module) -> str | None:
    return fingerprint(model, leave_out=lambda module: isinstance(module, ILMNorm))


def _follow_(norm: nn.Module, layer: nn.Module, original: nn.Module) -> None:
    """Move a norm to its layer's device, and to its dtype only if that is another since: a norm may hold several."""
    tensors = dict(layer.named_parameters())
    kept = ((p, tensors[name]) for name, p in original.named_parameters() if name in tensors)
    before, now = next(kept, (first_tensor(original), first_tensor(layer)))
    if before is not None and now is not None:
        norm.to(now.device, None if now.dtype == before.dtype else now.dtype)


def _layer_paths(decision: Decision) -> tuple[str, ...]:
    """All names of a converted norm's layer."""
    return decision.site.paths if decision.site.call is None else (decision.site.layer_path,)


def _module_at(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None
