"""What a calibration did, in numbers and words."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ilmconvert.calibration.fitting import Fit
from ilmconvert.metrics import Similarity
from ilmconvert.wording import plural, some

__all__ = ["CalibrationReport", "SiteCalibration"]


@dataclass(frozen=True)
class SiteCalibration:
    """One layer.

    Attributes:
        path: where it is.
        channels: its width.
        visits: how often it runs in one pass.
        fit: images, variance explained, degenerate channels.
    """

    path: str
    channels: int
    visits: int
    fit: Fit


@dataclass(frozen=True)
class CalibrationReport:
    """A whole calibration.

    Attributes:
        sites: the layers that were fitted, in execution order.
        not_fitted: layers left as they were, with the reason.
        images: calibration images, of all processes.
        held_out: whether ``before`` and ``after`` are on images that were not used for the fit.
        before, after: the converted model against the original.
        refused: what the fit gave, if that was further from the original than the start, which was kept then.
        added_parameters: of all ILM layers, over the norms they replaced.
        spilled: batches that had to wait on disk at some time, to keep the budget of memory.
    """

    sites: tuple[SiteCalibration, ...]
    not_fitted: dict[str, str]
    images: int
    held_out: bool
    before: Similarity
    after: Similarity
    refused: Similarity | None
    added_parameters: int
    spilled: int

    @property
    def degenerate(self) -> dict[str, tuple[int, ...]]:
        """Channels that kept their start because their input hardly varies, by path."""
        return {site.path: site.fit.degenerate for site in self.sites if site.fit.degenerate}

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)

    def __str__(self) -> str:
        worst = min(self.sites, key=lambda site: site.fit.explained_after, default=None)
        lines = [f"{plural(len(self.sites), 'layer')} fitted to {plural(self.images, 'image')}"]
        if worst is not None:
            lines.append(f"  variance explained: at least {worst.fit.explained_after:.6f} (at {worst.path})")
        where = "held-out images" if self.held_out else "the calibration images themselves"
        lines.append(f"  on {self.after.answers} answers of {where}:")
        for name, figure in (("before", self.before), ("after", self.after)):
            lines.append(
                f"    {name:6}  agreement {100 * figure.agreement:.1f} %  top-5 {100 * figure.top5:.1f} %  "
                f"KL {figure.kl:.2e}  cosine {figure.cosine:.6f}"
            )
        if self.refused is not None:
            lines.append(f"  the fit was further from the original (KL {self.refused.kl:.2e}), so the start was kept")
        lines.append(f"  parameters added by the ILM layers: {self.added_parameters:,}")
        if self.degenerate:
            channels = plural(sum(map(len, self.degenerate.values())), "channel")
            lines.append(f"  {channels} with an input that hardly varies kept the start, in {some(self.degenerate)}")
        lines += [f"  not fitted: {path}: {reason}" for path, reason in self.not_fitted.items()]
        return "\n".join(lines)
