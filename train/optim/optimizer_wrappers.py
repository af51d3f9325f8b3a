"""The optimizer of a run: what `optimizer` asks for, and around it what the adapter's method does to an update."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ...configs.run import RunConfig
from ...configs.sections.adapter import SPARSE_METHODS
from ...models.adapters.adapted_modules import find_adapted_modules
from ...models.adapters.selection import update_scaler
from ...parallel.layout import LayerOrder
from . import optimizers
from .adalora_schedule import AdaptedLayers, rank_allocator
from .qat import quantization_aware, trains_codes
from .sparse_finetuning import masked_optimizer

OptimizerFactory = Callable[..., optax.GradientTransformation]
ADAPTER_AXIS = "adapters"  # of the `vmap` over several adapters


def optimizer_factory(config: RunConfig, *, order: LayerOrder) -> OptimizerFactory:
    """`make()` gives the transformation; `make(clip=...)` the same with another clipping. `order`: of the layers."""
    adapter = config.adapter
    chosen = None if adapter is None else update_scaler(config.model, adapter, order=order)
    chosen = scale_by_adapter(chosen, learning_rate_ratios(config))
    make = partial(optimizers.build, config.optimizer, steps=config.steps, spike=config.logging.spike, scale=chosen)
    if adapter is not None and adapter.method == "adalora":
        return wrap_optimizer(
            make, partial(rank_allocator, adapter=adapter, present=adapted_layers(config, order), steps=config.steps)
        )
    if adapter is not None and adapter.method in SPARSE_METHODS:
        return wrap_optimizer(make, partial(masked_optimizer, adapter=adapter, scale=chosen))
    if trains_codes(config):
        return wrap_optimizer(make, partial(quantization_aware, config=config, order=order))
    return make


def adapted_layers(config: RunConfig, order: LayerOrder) -> AdaptedLayers:
    """Which layers of each stack of adapted maps have an adapter, as they stand in the run."""
    found = {}
    for site in find_adapted_modules(config.model, config.adapter):
        places = range(len(site.ranks)) if order is None else order
        found[f"{site.path}/adapter/e"] = np.array([repeat >= 0 and site.ranks[repeat] > 0 for repeat in places])
    return found


def wrap_optimizer(make: OptimizerFactory, around: Callable[..., optax.GradientTransformation]) -> OptimizerFactory:
    """`make`, with `around` around what it makes."""
    return lambda **given: around(make(**given))


def learning_rate_ratios(config: RunConfig) -> tuple[float, ...]:
    """Each adapter's learning rate over the run's."""
    peak, own = config.optimizer.learning_rate, [one.learning_rate for one in config.adapters.values()]
    return tuple(1.0 if rate is None else rate / peak for rate in own)


def scale_by_adapter(change: Callable[[str, jax.Array], jax.Array] | None, rates: tuple[float, ...]) -> Any:
    """`change(path, update)`, None: as it is, and the update scaled by the adapter's rate; inside of the `vmap`."""
    if all(rate == 1 for rate in rates):
        return change

    def own(path: str, update: jax.Array) -> jax.Array:
        return jnp.array(rates)[jax.lax.axis_index(ADAPTER_AXIS)] * (update if change is None else change(path, update))

    return own
