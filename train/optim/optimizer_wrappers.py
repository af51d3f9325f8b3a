"""The optimizer of a run: what `optimizer` asks for, and around it what the adapter's method does to an update."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ...configs.run import RunConfig
from ...configs.sections.adapter import ELEMENTS
from ...models.adapters.adapted_modules import sites
from ...models.adapters.selection import multipliers
from ...parallel.layout import Order
from . import optimizers
from .adalora_schedule import Present, allocated
from .qat import quantization_aware, trains_codes
from .sparse_finetuning import elementwise

Make = Callable[..., optax.GradientTransformation]
ADAPTER_AXIS = "adapters"  # of the `vmap` over several adapters


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


def learning_rates(config: RunConfig) -> tuple[float, ...]:
    """Each adapter's learning rate over the run's."""
    peak, own = config.optimizer.learning_rate, [one.learning_rate for one in config.adapters.values()]
    return tuple(1.0 if rate is None else rate / peak for rate in own)


def scaled(change: Callable[[str, jax.Array], jax.Array] | None, rates: tuple[float, ...]) -> Any:
    """`change(path, update)`, None: as it is, and the update scaled by the adapter's rate; inside of the `vmap`."""
    if all(rate == 1 for rate in rates):
        return change

    def own(path: str, update: jax.Array) -> jax.Array:
        return jnp.array(rates)[jax.lax.axis_index(ADAPTER_AXIS)] * (update if change is None else change(path, update))

    return own
