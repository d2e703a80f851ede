"""A plan: one decision for every norm of a model, as plain data that can be reviewed, edited and replayed."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from typing import Literal

from ilmconvert.errors import PlanError, UsageError
from ilmconvert.graph.sites import Site, SiteSearch
from ilmconvert.jsonable import from_data, parse_json
from ilmconvert.nn.grouping import KEY_GROUP_SIZE, REDUCTION, bottleneck, key_groups, nearest_groups
from ilmconvert.norms import NormSpec, Refusal
from ilmconvert.norms.build import Target
from ilmconvert.options import FAMILIES, ConvertOptions

__all__ = ["PLAN_VERSION", "Decision", "Plan", "make_plan"]

PLAN_VERSION = 1
DEFAULT_GROUPS = 32
MAX_DENSE = 32  # key groups from which on a head of 6 K^2 weights is cut into blocks of one key group each


@dataclass(frozen=True)
class Decision:
    """What happens to one norm.

    Attributes:
        site: the norm.
        action: ``convert`` or ``skip``.
        target: the choices for the new layer, when converted.
        code, reason: why it is skipped: a short code and a sentence.
        notes: what was adjusted or could not be checked.
    """

    site: Site
    action: Literal["convert", "skip"]
    target: Target | None = None
    code: str | None = None
    reason: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def path(self) -> str:
        """The site's canonical path."""
        return self.site.path

    @property
    def norm(self) -> str:
        """The norm's short class name."""
        return self.site.class_name

    @property
    def preserves(self) -> bool:
        """Whether the converted layer starts with the norm's own output."""
        target, spec = self.target, self.site.spec
        if target is None or spec is None:
            return False
        return spec.preserves and target.mode == "preserve" and target.num_groups == spec.num_groups

    @property
    def added_parameters(self) -> int:
        """Parameters that the new layer has and the norm has not."""
        target, spec = self.target, self.site.spec
        if self.action == "skip" or target is None or spec is None:
            return 0
        size = math.prod(spec.shape)
        affine = size * (spec.weight + spec.bias) - self.site.parameters
        predictor = 3 * target.num_key_groups * target.hidden_features // target.num_blocks
        return affine + predictor + 2 * size * target.gains

    @property
    def keeps_function(self) -> bool:
        """Whether the model still computes in evaluation what it did, exactly or to the reach of a predictor."""
        return self.preserves or (self.target is not None and self.target.standardized_keys)


@dataclass(frozen=True)
class Plan:
    """The decisions for one model, in execution order.

    Attributes:
        options: what was asked for.
        decisions: one for each norm found.
        model: the class of the model it was made for.
        untraced: module paths that torch.fx could not follow, with the reason; found there by other means.
        notes: what concerns the model as a whole.
        version: of this format.

    Raises:
        ValueError: several decisions for one norm.

    Example:
        >>> import ilmconvert, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.LayerNorm(16), torch.nn.Softmax(-1))
        >>> plan = ilmconvert.inspect(model).plan
        >>> [(decision.path, decision.norm, decision.action) for decision in plan.decisions]
        [('1', 'LayerNorm', 'convert')]
        >>> Plan.from_json(plan.to_json()) == plan
        True
    """

    options: ConvertOptions
    decisions: tuple[Decision, ...]
    model: str
    untraced: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    version: int = PLAN_VERSION

    def __post_init__(self) -> None:
        count = Counter(path for decision in self.decisions for path in decision.site.paths)
        if twice := sorted(path for path, times in count.items() if times > 1):
            raise ValueError(f"one decision for each norm, got several for {', '.join(twice[:3])}")

    @property
    def converted(self) -> tuple[Decision, ...]:
        """The norms to convert."""
        return tuple(d for d in self.decisions if d.action == "convert")

    @property
    def skipped(self) -> tuple[Decision, ...]:
        """The norms to leave, each with its reason."""
        return tuple(d for d in self.decisions if d.action == "skip")

    def to_json(self) -> str:
        """The plan as JSON text, stable under a round trip."""
        return json.dumps(asdict(self), indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read a plan back.

        Raises:
            PlanError: not JSON, not a plan, an unknown field or value, or a version this release does not read.
        """
        try:
            data = parse_json(text)
        except ValueError as error:
            raise PlanError(f"expected a plan in JSON, got text that does not parse: {error}") from error
        version = data.get("version") if isinstance(data, dict) else None
        if version != PLAN_VERSION:
            raise PlanError(f"expected a plan of version {PLAN_VERSION}, got version {version!r}; make it anew")
        plan = from_data(cls, data, "plan")
        for decision in plan.decisions:
            if decision.action == "convert" and (decision.target is None or decision.site.spec is None):
                raise PlanError(f"expected a target for {decision.path!r}, which is to be converted; the plan has none")
        return plan


def make_plan(search: SiteSearch, options: ConvertOptions, model: str) -> Plan:
    """Decide for every site.

    Raises:
        UsageError: a pattern or a norm name in the options that no site answers to.
    """
    _check_filters(search.sites, options)
    notes = []
    if search.run_error:
        notes.append(f"the model could not be run on fake tensors, so input shapes are unknown: {search.run_error}")
    elif not search.shapes_known:
        notes.append("no input size is known, so groups were not checked against the sizes of feature maps")
    decisions = tuple(_decide(site, options, search.shapes_known) for site in search.sites)
    return Plan(options, decisions, model, search.untraced, tuple(notes))


def _decide(site: Site, options: ConvertOptions, shapes_known: bool) -> Decision:
    refusal = site.refusal or _filtered(site, options)
    if refusal is None and site.spec is not None:
        target, notes = _target(site.spec, site.input_shapes, options)
        if site.parametrized and options.mode == "paper":
            refusal = Refusal("parametrized", "its scale or shift is computed; mode paper starts from other values")
        elif target is not None:
            unused = site.idle and shapes_known
            notes += ("it does not run in the model's current mode",) if unused else ()
            return Decision(site, "convert", target, notes=notes)
        else:
            refusal = Refusal("single-value", "each instance has a single value here, which standardizes to zero")
    return Decision(site, "skip", code=refusal.code if refusal else None, reason=refusal.reason if refusal else None)


def _target(
    spec: NormSpec, shapes: Sequence[tuple[int, ...]], options: ConvertOptions
) -> tuple[Target | None, tuple[str, ...]]:
    """Groups and embedding for one norm; None if every instance is a single value."""
    channels, positions, notes = spec.num_channels, _positions(spec, shapes), []
    groups = spec.num_groups
    if groups is None:
        wanted = _wanted_groups(channels, options)
        groups = nearest_groups(channels, wanted, positions=positions)
        if channels // groups * positions < 2:
            return None, ()
        if groups != wanted:
            notes.append(f"{groups} groups instead of {wanted:g}: {_why(channels, wanted)}")
        detecting = spec.fixed_statistics and options.mode == "preserve" and options.gains is not False
        if detecting and _default_head(options):
            blocks = 1 if groups <= MAX_DENSE else groups
            return Target(groups, groups, 2 * groups, gains=True, standardized_keys=True, num_blocks=blocks), (*notes,)
    size = options.key_group_size or KEY_GROUP_SIZE
    keys = key_groups(channels, size, positions=positions)
    if keys * size != channels:
        notes.append(f"key groups of {channels // keys} channels instead of {size}")
    grouped = 1 < groups < channels
    hidden = bottleneck(keys, options.reduction or REDUCTION, mode=options.mode, grouped=grouped)
    return Target(groups, keys, hidden, options.mode, bool(options.gains)), tuple(notes)


def _default_head(options: ConvertOptions) -> bool:
    return options.key_group_size is None and options.reduction is None


def _wanted_groups(channels: int, options: ConvertOptions) -> float:
    if options.bn_to == "layer":
        return 1
    if options.bn_to == "instance":
        return channels
    if options.group_size:
        return max(channels / options.group_size, 1)
    return options.num_groups or DEFAULT_GROUPS


def _why(channels: int, wanted: float) -> str:
    if wanted == int(wanted) and channels % int(wanted) == 0:
        return "a group would hold a single value"
    return f"it does not divide {channels} channels"


def _positions(spec: NormSpec, shapes: Sequence[tuple[int, ...]]) -> int:
    """Values that each channel gives to a group, at the smallest input seen; without one, a guess from the class."""
    how = spec.standardization
    if how.layout != "sample":
        return math.prod(spec.shape[1:])
    if shapes:
        return min(math.prod(shape[1 if len(shape) == how.unbatched_ndim else 2 :]) for shape in shapes)
    return 2 if (spec.spatial_ndim or 0) >= 2 or spec.num_groups else 1


def _filtered(site: Site, options: ConvertOptions) -> Refusal | None:
    """The refusal of a site that the user's filters leave out."""
    if options.include and not _matches(site, options.include):
        return Refusal("not-included", f"its path matches none of the included patterns: {', '.join(options.include)}")
    if _matches(site, options.exclude):
        return Refusal("excluded", f"its path matches an excluded pattern: {', '.join(options.exclude)}")
    if options.norms and not _names(site) & set(options.norms):
        return Refusal("not-included", f"only these norms were asked for: {', '.join(options.norms)}")
    if _names(site) & set(options.skip_norms):
        return Refusal("excluded", f"these norms were left out: {', '.join(options.skip_norms)}")
    return None


def _matches(site: Site, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(path, pattern) for path in site.paths for pattern in patterns)


def _names(site: Site) -> set[str]:
    return {name for name in (site.family, site.class_name, site.norm) if name}


def _check_filters(sites: Sequence[Site], options: ConvertOptions) -> None:
    """A filter that says nothing about this model is a typing error, not a wish to convert nothing."""
    for pattern in (*options.include, *options.exclude):
        if not any(_matches(site, (pattern,)) for site in sites):
            some = ", ".join(site.path for site in sites[:3]) or "none"
            raise UsageError(
                f"expected the pattern {pattern!r} to match the path of a norm, but it matches none of the "
                f"{len(sites)}; paths here are such as {some}"
            )
    present = set().union(*(_names(site) for site in sites))
    for name in (*options.norms, *options.skip_norms):
        if name not in present and name not in FAMILIES:
            raise UsageError(
                f"expected a norm of this model or a family ({', '.join(FAMILIES)}), got {name!r}; the model has: "
                f"{', '.join(sorted({site.class_name for site in sites})) or 'no norms'}"
            )
