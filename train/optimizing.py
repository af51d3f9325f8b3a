"""The optimizer of a run: what `optimizer` asks for, and around it what the adapter's method does to an update."""

from collections.abc import Callable
from functools import partial

import numpy as np
import optax

from ..configs.adapter import ELEMENTS
from ..configs.run import RunConfig
from ..models.adapters.selection import multipliers
from ..models.adapters.sites import sites
from ..parallel.layout import Order
from . import optimizers
from .codes import quantization_aware, trains_codes
from .elements import elementwise
from .ranks import Present, allocated
from .several import learning_rates, scaled

Make = Callable[..., optax.GradientTransformation]


def optimizer_maker(config: RunConfig, *, order: Order) -> Make:
    """`make()` gives the transformation; `make(clip=...)` the same with another clipping. `order`: of the layers."""
    adapter = config.adapter
    chosen = None if adapter is None else multipliers(config.model, adapter, order=order)
    chosen = scaled(chosen, learning_rates(config))
    make = partial(
        optimizers.build, config.optimizer, steps=config.steps, spike=config.logging.spike, multiplied=chosen
    )
    if adapter is not None and adapter.method == "adalora":
        return wrapped(make, partial(allocated, adapter=adapter, present=present(config, order), steps=config.steps))
    if adapter is not None and adapter.method in ELEMENTS:
        return wrapped(make, partial(elementwise, adapter=adapter, chosen=chosen))
    if trains_codes(config):
        return wrapped(make, partial(quantization_aware, config=config, order=order))
    return make


def present(config: RunConfig, order: Order) -> Present:
    """Which layers of each stack of adapted maps have an adapter, as they stand in the run."""
    found = {}
    for site in sites(config.model, config.adapter):
        places = range(len(site.ranks)) if order is None else order
        found[f"{site.path}/adapter/e"] = np.array([repeat >= 0 and site.ranks[repeat] > 0 for repeat in places])
    return found


def wrapped(make: Make, around: Callable[..., optax.GradientTransformation]) -> Make:
    """`make`, with `around` around what it makes."""
    return lambda **given: around(make(**given))
