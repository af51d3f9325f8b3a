"""Outer optimizers by their name in YAML (`outer.name`): from the section to pure functions."""

from collections.abc import Callable

from ...configs.sections.model import ModelConfig
from ...configs.sections.outer import OuterConfig
from ..layout import LayerOrder
from .diloco import diloco
from .eager import eager
from .exchange import WireNames
from .fragment_slices import slice_fragment
from .fragments import split_fragments
from .interface import Exchange, OuterOptimizer
from .local_sgd import local_sgd
from .noloco import noloco
from .peer_average import peer_average
from .streaming_diloco import streaming_diloco

ExchangeFactory = Callable[[WireNames], Exchange]  # wire format, or one for each of a tuple of trees
Builder = Callable[[OuterConfig, ModelConfig, ExchangeFactory, int, LayerOrder], OuterOptimizer]


def _streaming(
    outer: OuterConfig, model: ModelConfig, exchange_factory: ExchangeFactory, replicas: int, order: LayerOrder
) -> OuterOptimizer:
    fragments = split_fragments(model.layers, count=outer.fragments, order=outer.order)
    return streaming_diloco(
        exchange_factory(outer.wire),
        fragments=[slice_fragment(fragment, model, order) for fragment in fragments],
        interval=outer.every,
        learning_rate=outer.learning_rate,
        momentum=outer.momentum,
        overlap=outer.overlap,
        mix=outer.mix,
    )


OUTER_OPTIMIZERS: dict[str, Builder] = {
    "diloco": lambda outer, model, exchange_factory, replicas, order: diloco(
        exchange_factory(outer.wire), interval=outer.every, learning_rate=outer.learning_rate, momentum=outer.momentum
    ),
    "streaming": _streaming,
    "noloco": lambda outer, model, exchange_factory, replicas, order: noloco(
        exchange_factory((outer.wire, "float32")),
        interval=outer.every,
        learning_rate=outer.learning_rate,
        momentum=outer.momentum,
        consensus=outer.consensus,
    ),
    "local-sgd": lambda outer, model, exchange_factory, replicas, order: local_sgd(
        exchange_factory(outer.wire), interval=outer.every
    ),
    "eager": lambda outer, model, exchange_factory, replicas, order: eager(
        exchange_factory(outer.wire),
        replicas=replicas,
        interval=outer.every,
        learning_rate=outer.learning_rate,
        momentum=outer.momentum,
    ),
    "peer-average": lambda outer, model, exchange_factory, replicas, order: peer_average(
        exchange_factory(outer.wire), interval=outer.every, rate=outer.rate
    ),
}


def build_outer_optimizer(
    outer: OuterConfig,
    *,
    model: ModelConfig,
    exchange_factory: ExchangeFactory,
    replicas: int,
    order: LayerOrder = None,
) -> OuterOptimizer:
    """The outer optimizer of the section `outer` for `replicas` replicas of `model`.

    `order` is that of the layers in the run's stacks (`parallel/layout.py`).
    """
    return OUTER_OPTIMIZERS[outer.name](outer, model, exchange_factory, replicas, order)
