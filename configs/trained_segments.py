"""Segments at the boundaries of trained layers: trained and frozen layers are stacked separately.

So no backward pass runs below the first trained layer, and frozen layers get no gradient. Source: PockEngine,
arXiv:2310.17752, section 3.2.
"""

from fnmatch import fnmatchcase

from .sections.adapter import AdapterConfig
from .sections.model import ModelConfig


def segment_starts(model: ModelConfig, adapter: AdapterConfig | None) -> tuple[int, ...]:
    """Layers at which a segment starts: where the layers that `adapter` may train begin and end.

    >>> segment_starts(ModelConfig(layers=8), AdapterConfig(method="selective", targets=["layers/[67]/*"]))
    (6,)
    """
    if adapter is None or (adapter.targets is None and adapter.layers is None):
        return ()
    trained = set().union(*(matching_layers(pattern, layers=model.layers) for pattern in adapter.targets or ["*"]))
    trained = {layer for layer in trained if layer >= first_trained(model, adapter)}
    return tuple(layer for layer in range(1, model.layers) if (layer in trained) != (layer - 1 in trained))


def first_trained(model: ModelConfig, adapter: AdapterConfig) -> int:
    """The first layer that may be trained by `adapter.layers`."""
    return 0 if adapter.layers is None else model.layers - adapter.layers


def matching_layers(pattern: str, *, layers: int) -> set[int]:
    """Layers in which `pattern` may match a weight; none for a pattern of weights outside of layers."""
    head, _, rest = pattern.partition("/")
    all_layers = set(range(layers))
    if head == "layers" and rest:
        return {layer for layer in all_layers if fnmatchcase(str(layer), rest.split("/")[0])} or all_layers
    return set() if head in ("embed", "final_norm", "head") else all_layers
