"""Finding what runs: tracing with torch.fx, shapes from a run without values, and the sites that result."""

from ilmconvert.graph.inputs import Inputs, example_inputs
from ilmconvert.graph.sites import Site, SiteSearch, find_sites
from ilmconvert.graph.tracer import NormTracer, trace

__all__ = ["Inputs", "NormTracer", "Site", "SiteSearch", "example_inputs", "find_sites", "trace"]
