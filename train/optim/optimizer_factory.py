"""The optimizer of a run: that of the `optimizer` section, wrapped by what the adapter's method does to updates."""

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
from .adalora_schedule import AdaptedLayers, rank_allocator
from .optimizer_chain import build_optimizer
from .qat import quantization_aware, trains_codes
from .sparse_finetuning import masked_optimizer

OptimizerFactory = Callable[..., optax.GradientTransformation]
ADAPTER_AXIS = "adapters"  # axis name of the `vmap` over several adapters


def optimizer_factory(config: RunConfig, *, order: LayerOrder) -> OptimizerFactory:
    """Return a factory: `make()` makes the optimizer, `make(clip=...)` the same one with another clipping.

    `order` is the run order of the layers.
    """
    adapter = config.adapter
    scale = None if adapter is None else update_scaler(config.model, adapter, order=order)
    scale = scale_by_adapter(scale, learning_rate_ratios(config))
    make = partial(build_optimizer, config.optimizer, steps=config.steps, spike=config.logging.spike, scale=scale)
    if adapter is not None and adapter.method == "adalora":
        present = adapted_layers(config, order)
        wrap = partial(rank_allocator, adapter=adapter, present=present, steps=config.steps)
    elif adapter is not None and adapter.method in SPARSE_METHODS:
        wrap = partial(masked_optimizer, adapter=adapter, scale=scale)
    elif trains_codes(config):
        wrap = partial(quantization_aware, config=config, order=order)
    else:
        return make
    return lambda **options: wrap(make(**options))


def adapted_layers(config: RunConfig, order: LayerOrder) -> AdaptedLayers:
    """Return which layers of each stack of adapted modules have an adapter, in run order."""
    layers = {}
    for module in find_adapted_modules(config.model, config.adapter):
        repeats = range(len(module.ranks)) if order is None else order
        layers[f"{module.path}/adapter/e"] = np.array([repeat >= 0 and module.ranks[repeat] > 0 for repeat in repeats])
    return layers


def learning_rate_ratios(config: RunConfig) -> tuple[float, ...]:
    """Return each adapter's learning rate / the run's."""
    rates = [adapter.learning_rate for adapter in config.adapters.values()]
    return tuple(1.0 if rate is None else rate / config.optimizer.learning_rate for rate in rates)


def scale_by_adapter(scale: Callable[[str, jax.Array], jax.Array] | None, ratios: tuple[float, ...]) -> Any:
    """Multiply what `scale(path, update)` gives by the adapter's learning rate ratio, inside of the `vmap`."""
    if all(ratio == 1 for ratio in ratios):
        return scale

    def scale_update(path: str, update: jax.Array) -> jax.Array:
        ratio = jnp.array(ratios)[jax.lax.axis_index(ADAPTER_AXIS)]
        return ratio * (update if scale is None else scale(path, update))

    return scale_update
