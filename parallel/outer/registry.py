"""The outer optimizers by the name `outer.name` gives them: from the section to pure functions."""

from collections.abc import Callable

from ...configs.sections.model import ModelConfig
from ...configs.sections.outer import OuterConfig
from ..layout import LayerOrder
from .diloco import diloco
from .eager import eager
from .exchange import Wires
from .fragment_slices import cut
from .fragments import fragments
from .interface import Exchange, OuterOptimizer
from .local_sgd import local_sgd
from .noloco import noloco
from .peer_average import peer_average
from .streaming_diloco import streaming

Travel = Callable[[Wires], Exchange]  # wire format, or one for each of a tuple of trees -> how they travel here


def _diloco(outer: OuterConfig, model: ModelConfig, travel: Travel, replicas: int, order: LayerOrder) -> OuterOptimizer:
    return diloco(travel(outer.wire), every=outer.every, learning_rate=outer.learning_rate, momentum=outer.momentum)


def _streaming(
    outer: OuterConfig, model: ModelConfig, travel: Travel, replicas: int, order: LayerOrder
) -> OuterOptimizer:
    return streaming(
        travel(outer.wire),
        cuts=[cut(part, model, order) for part in fragments(model.layers, count=outer.fragments, order=outer.order)],
        every=outer.every,
        learning_rate=outer.learning_rate,
        momentum=outer.momentum,
        overlap=outer.overlap,
        mix=outer.mix,
    )


def _noloco(outer: OuterConfig, model: ModelConfig, travel: Travel, replicas: int, order: LayerOrder) -> OuterOptimizer:
    return noloco(
        travel((outer.wire, "float32")),
        every=outer.every,
        learning_rate=outer.learning_rate,
        momentum=outer.momentum,
        consensus=outer.consensus,
    )


def _eager(outer: OuterConfig, model: ModelConfig, travel: Travel, replicas: int, order: LayerOrder) -> OuterOptimizer:
    return eager(
        travel(outer.wire),
        replicas=replicas,
        every=outer.every,
        learning_rate=outer.learning_rate,
        momentum=outer.momentum,
    )


OUTER: dict[str, Callable[[OuterConfig, ModelConfig, Travel, int, LayerOrder], OuterOptimizer]] = {
    "diloco": _diloco,
    "streaming": _streaming,
    "noloco": _noloco,
    "local-sgd": lambda outer, model, travel, replicas, order: local_sgd(travel(outer.wire), every=outer.every),
    "eager": _eager,
    "peer-average": lambda outer, model, travel, replicas, order: peer_average(
        travel(outer.wire), every=outer.every, rate=outer.rate
    ),
}


def build(
    outer: OuterConfig, *, model: ModelConfig, travel: Travel, replicas: int, order: LayerOrder = None
) -> OuterOptimizer:
    """The outer optimizer of the section `outer` for `replicas` replicas of `model`.

    `order` is that of the layers in the run's stacks (`parallel/layout.py`).
    """
    return OUTER[outer.name](outer, model, travel, replicas, order)
