"""What a conversion did, or would do, in words and numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from ilmconvert.finite import all_finite, not_finite
from ilmconvert.norms.batch import is_untrained
from ilmconvert.plan import Decision, Plan
from ilmconvert.wording import plural, some

__all__ = ["Report", "describe_target"]


@dataclass(frozen=True)
class Report:
    """The account of every norm of a model.

    Attributes:
        plan: the decisions.
        parameters: parameters of the original model.
        untrained: paths of converted norms that had the running statistics of an untrained network.
        not_finite: paths of converted norms with NaN or infinity in their tensors.

    Example:
        >>> import ilmconvert, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.LayerNorm(16))
        >>> report = ilmconvert.inspect(model, example_inputs=torch.randn(4, 8))
        >>> print(report)
        Sequential: 1 norm converted, 0 skipped
          1 x LayerNorm -> ILM layer (per token)
          parameters added: 6 (3.41 %)
          the converted model starts with the original's outputs
        >>> report.exact, report.added_parameters, report.warnings
        (True, 6, ())
    """

    plan: Plan
    parameters: int
    untrained: tuple[str, ...] = ()
    not_finite: tuple[str, ...] = ()

    @classmethod
    def of(cls, plan: Plan, parameters: int, norms: Mapping[str, nn.Module]) -> Report:
        """The account of a plan; ``norms`` are those to convert, by path."""
        kept = [d.path for d in plan.converted if d.target is not None and d.target.mode == "preserve"]
        untrained = tuple(path for path in kept if path in norms and is_untrained(norms[path]))
        bad = () if all_finite(norms.values()) else tuple(path for path, norm in norms.items() if not_finite(norm))
        return cls(plan, parameters, untrained, bad)

    @property
    def converted(self) -> tuple[Decision, ...]:
        """The norms that became ILM layers."""
        return self.plan.converted

    @property
    def skipped(self) -> tuple[Decision, ...]:
        """The norms that stay, each with its reason."""
        return self.plan.skipped

    @property
    def added_parameters(self) -> int:
        """Parameters that the conversion adds."""
        return sum(d.added_parameters for d in self.converted)

    @property
    def added_percent(self) -> float:
        """The same, in percent of the original model's parameters."""
        return 100 * self.added_parameters / max(self.parameters, 1)

    @property
    def exact(self) -> bool:
        """Whether the converted model starts with the original's outputs."""
        return all(d.preserves for d in self.converted)

    @property
    def start(self) -> str:
        """How the converted model starts, in a sentence; empty if that is not what it computed before."""
        if not self.converted or any(not d.keeps_function for d in self.converted):
            return ""
        batch = sum(not d.preserves for d in self.converted)
        if not batch:
            return "the converted model starts with the original's outputs"
        if len(self.untrained) == batch:  # there is no function to be close to
            return ""
        return (
            "the converted model starts close to the original's outputs in evaluation: "
            f"{plural(batch, 'norm')} with batch statistics became layers whose predictors apply the running ones to "
            "each instance"
        )

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the user must know before relying on the converted model."""
        changed = [d for d in self.converted if not d.keeps_function]
        idle = [d.path for d in self.converted if d.site.idle]
        notes = self.plan.notes
        if idle:
            notes = (f"{plural(len(idle), 'norm')} did not run in the model's current mode: {some(idle)}", *notes)
        if self.plan.decisions and not self.converted:
            notes = ("no norm was converted", *notes)
        elif not self.plan.decisions:
            notes = ("the model has no norm to convert", *notes)
        if self.not_finite:
            notes = (
                f"{plural(len(self.not_finite), 'norm')} with NaN or infinity ({some(self.not_finite)}), from which "
                "no layer can start: load other weights",
                *notes,
            )
        if self.untrained:
            notes = (
                f"{plural(len(self.untrained), 'norm')} with the running statistics of an untrained network "
                f"({some(self.untrained)}): load trained weights before the conversion (--pretrained or --checkpoint "
                "on the command line), or train what comes out of it",
                *notes,
            )
        if not changed:
            return notes
        if all(d.target and d.target.mode == "paper" for d in changed):
            first = f"{plural(len(changed), 'layer')} start from the paper's initialisation: the model must be trained"
        else:
            calls = all(d.site.call is not None for d in changed)  # calibration knows modules alone
            first = (
                f"the model's function has changed: {plural(len(changed), 'norm')} used batch statistics, of "
                f"which the new layers keep at most the average effect, so {'' if calls else 'calibrate or '}train the "
                "model before relying on it"
            )
        return (first, *notes)

    def conversions(self) -> list[tuple[str, str, int]]:
        """(from, to, count) of the converted norms, in order of appearance."""
        return [(*key, n) for key, n in Counter((d.norm, describe_target(d)) for d in self.converted).items()]

    def skips(self) -> list[tuple[str, str, int]]:
        """(norm, reason, count) of the skipped norms, in order of appearance."""
        return [(*key, n) for key, n in Counter((d.norm, d.reason or "") for d in self.skipped).items()]

    def to_dict(self) -> dict[str, Any]:
        """The summary as plain data."""
        return {
            "model": self.plan.model,
            "converted": len(self.converted),
            "skipped": [{"path": d.path, "norm": d.norm, "code": d.code, "reason": d.reason} for d in self.skipped],
            "exact": self.exact,
            "keeps_function": all(d.keeps_function for d in self.converted),
            "parameters": self.parameters,
            "added_parameters": self.added_parameters,
            "added_percent": round(self.added_percent, 4),
            "adjusted": {d.path: list(d.notes) for d in self.converted if d.notes},
            "untrained": list(self.untrained),
            "not_finite": list(self.not_finite),
            "untraced": self.plan.untraced,
            "warnings": list(self.warnings),
        }

    def __str__(self) -> str:
        lines = [f"{self.plan.model}: {plural(len(self.converted), 'norm')} converted, {len(self.skipped)} skipped"]
        lines += [f"  {n} x {norm} -> {target}" for norm, target, n in self.conversions()]
        lines += [f"  skipped {n} x {norm}: {reason}" for norm, reason, n in self.skips()]
        if self.plan.untraced:
            pieces = plural(len(self.plan.untraced), "module")
            lines += [f"  {pieces} could not be traced by torch.fx; their norms were found piece by piece"]
        lines += [f"  parameters added: {self.added_parameters:,} ({self.added_percent:.2f} %)"]
        lines += [f"  {self.start}"] if self.start else []
        return "\n".join([*lines, *(f"  warning: {w}" for w in self.warnings)])


def describe_target(decision: Decision) -> str:
    """A short name for what a norm becomes.

    Example: ``ILM layer (1 group)``, ``ILM group (32 groups)``, ``ILM instance``, ``ILM rms``.
    """
    target, spec = decision.target, decision.site.spec
    if target is None or spec is None:
        return "-"
    if decision.site.family == "rms":
        return "ILM rms"
    if spec.standardization.layout == "token":
        return "ILM layer (per token)"
    if spec.standardization.layout == "position":
        return "ILM layer (per position)"
    if target.num_groups == spec.num_channels:
        return "ILM instance"
    return "ILM layer (1 group)" if target.num_groups == 1 else f"ILM group ({target.num_groups} groups)"
