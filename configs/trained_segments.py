"""Where the layers that learn begin and end: they get stacks of their own, so that nothing below the first of them has
a backward pass, and nothing beside them a gradient. Source: PockEngine, arXiv:2310.17752, section 3.2.
"""

from fnmatch import fnmatchcase

from .sections.adapter import AdapterConfig
from .sections.model import ModelConfig


def segment_starts(model: ModelConfig, adapter: AdapterConfig | None) -> tuple[int, ...]:
    """Numbers of the layers that begin a segment: where layers that `adapter` may train begin and end.

    >>> cuts(ModelConfig(layers=8), AdapterConfig(method="selective", targets=["layers/[67]/*"]))
    (6,)
    """
    if adapter is None or (adapter.targets is None and adapter.layers is None):
        return ()
    chosen = set().union(*(matching_layers(pattern, layers=model.layers) for pattern in adapter.targets or ["*"]))
    chosen = {layer for layer in chosen if layer >= first_trained(model, adapter)}
    return tuple(layer for layer in range(1, model.layers) if (layer in chosen) != (layer - 1 in chosen))


def first_trained(model: ModelConfig, adapter: AdapterConfig) -> int:
    """The lowest layer that `adapter.layers` leaves to be trained."""
    return 0 if adapter.layers is None else model.layers - adapter.layers


def matching_layers(pattern: str, *, layers: int) -> set[int]:
    """Layers in which `pattern` may match something; none where it names what is outside of the layers."""
    head, _, rest = pattern.partition("/")
    every = set(range(layers))
    if head == "layers" and rest:
        found = {layer for layer in every if fnmatchcase(str(layer), rest.split("/")[0])}
        return found or every
    return set() if head in ("embed", "final_norm", "head") else every
