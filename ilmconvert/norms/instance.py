"""Instance Norm: each channel over the positions of a sample (Ulyanov, Vedaldi and Lempitsky, 2016).

With ``track_running_stats=True`` it infers with running statistics as Batch Norm does, and is converted as that is.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from ilmconvert.nn import ILMNorm
from ilmconvert.nn.functional import Standardization
from ilmconvert.norms.batch import Batch
from ilmconvert.norms.registry import NormHandler, register
from ilmconvert.norms.spec import NormSpec

_MODULE = "torch.nn.modules.instancenorm"
_SPATIAL = {"InstanceNorm1d": 1, "InstanceNorm2d": 2, "InstanceNorm3d": 3}


@register(f"{_MODULE}.InstanceNorm1d", f"{_MODULE}.InstanceNorm2d", f"{_MODULE}.InstanceNorm3d")
class Instance(NormHandler):
    """``nn.InstanceNorm*``; inputs without the batch dimension are taken too."""

    family = "instance"

    def describe(self, module: nn.Module) -> NormSpec:
        """One group per channel; with running statistics, as Batch Norm."""
        channels = int(module.num_features)  # type: ignore[arg-type]
        spatial = next(n for c in type(module).__mro__ if (n := _SPATIAL.get(c.__name__)))
        spec = NormSpec(
            shape=(channels,),
            num_groups=channels,
            standardization=Standardization(eps=module.eps, unbatched_ndim=spatial + 1, output="input"),  # type: ignore[arg-type]
            weight=module.weight is not None,
            bias=module.bias is not None,
            spatial_ndim=spatial,
        )
        if not module.track_running_stats:
            return spec
        known = Batch().describe(module).fixed_statistics
        return replace(spec, num_groups=None, preserves=False, weight=True, bias=True, fixed_statistics=known)

    def affine(self, module: nn.Module, num_groups: int) -> tuple[Tensor | None, Tensor | None]:
        """The norm's own, or what its running statistics say on average."""
        if module.track_running_stats:
            return Batch().affine(module, num_groups)
        return super().affine(module, num_groups)

    def set_predictor_(self, module: nn.Module, layer: ILMNorm) -> None:
        """As Batch Norm's, if there are running statistics."""
        if module.track_running_stats:
            Batch().set_predictor_(module, layer)
