"""Several adapters trained in one step, each as in a run of its own; a recipe, an update and a state lifted over them.

    gradients together      one forward and one backward pass of the base over everybody's rows
    all that comes after    apart: a `vmap` over adapters of what follows in any step

The loss of a batch is a number for each adapter, over the weights of its own rows. None of them reads another's
parameters, so one backward pass of their sum gives the gradient of each. Norm, clipping, health, decay, learning rate
and the state of the optimizer are then each adapter's own: `alone` in `configs/adapter_runs.py` is the run that makes
the same updates.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, PartitionSpec

from ...configs.adapter_runs import rows_of
from ...configs.names import ADAPTER_FIELD
from ...configs.run import RunConfig
from ...models.adapters.multi_lora import PRODUCTS, to_decoder_order
from ...parallel.gradients import Batch, Sums
from ...parallel.state import TrainState
from ..objectives.interface import Loss
from ..optim.optimizer_wrappers import ADAPTER_AXIS, learning_rates
from .step import ApplyUpdate


@dataclass(frozen=True)
class MultiAdapter:
    """How what is computed for one adapter is computed for several."""

    rows: dict[str, int]  # of a batch, by name
    learning_rate_ratios: tuple[float, ...]  # each one's learning rate over the run's

    def loss(self, recipe: Loss) -> Loss:
        """`recipe`, its numerator and weight [adapters]."""

        def sums(values: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
            # Sums over rows, as all recipes' are: of each row by itself, then of each adapter's rows.
            alone = jax.vmap(lambda *row: recipe(*jax.tree.map(lambda leaf: leaf[None], row)))(values, batch)
            own = batch[ADAPTER_FIELD][:, 0] == jnp.arange(len(self.rows))[:, None]
            # Not a product: one row that is not a number must not spoil the others' sums.
            return tuple(jnp.where(own, one, 0).sum(axis=1) for one in alone)

        return sums

    def values(self, make: Callable[..., Callable[..., jax.Array]]) -> Callable[..., Callable[..., jax.Array]]:
        """`make`, whose functions `(params, frozen, batch, keys)` take parameters as the state has them."""

        def made(*given: Any, **named: Any) -> Callable[..., jax.Array]:
            values = make(*given, **named)
            return lambda params, *rest: values(to_decoder_order(params), *rest)

        return made

    def row_ids(self) -> jax.Array:
        """Of each row of the global batch among its adapter's own: what dropout is drawn by."""
        return jnp.concatenate([jnp.arange(rows) for rows in self.rows.values()])

    def optimizer(self, one: optax.GradientTransformation) -> optax.GradientTransformation:
        """`one` of each adapter."""
        return optax.GradientTransformation(jax.vmap(one.init), jax.vmap(one.update, axis_name=ADAPTER_AXIS))

    def apply_update(self, one: ApplyUpdate) -> ApplyUpdate:
        """What `one` makes of an adapter's sums, of everybody's; metrics of all, and `name/metric` of each."""

        def every(sums: Sums, state: TrainState) -> tuple[TrainState, dict[str, jax.Array]]:
            def own(sums: Sums, params: Any, opt_state: Any) -> tuple[Any, Any, dict[str, jax.Array]]:
                new, metrics = one(sums, dataclasses.replace(state, params=params, opt_state=opt_state))
                return new.params, new.opt_state, metrics

            params, opt_state, metrics = jax.vmap(own, axis_name=ADAPTER_AXIS)(sums, state.params, state.opt_state)
            new = dataclasses.replace(state, step=state.step + 1, params=params, opt_state=opt_state)
            return new, self.flatten_metrics(metrics)

        return every

    def flatten_metrics(self, metrics: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """Metrics [adapters] as numbers: of all, then of each by name."""
        weights = metrics["tokens"] / jnp.maximum(metrics["tokens"].sum(), 1e-9)
        together = {name: jnp.sum(weights * one) for name, one in metrics.items()}
        together |= {
            "learning_rate": metrics["learning_rate"][0],
            "tokens": metrics["tokens"].sum(),
            "grad_norm": jnp.sqrt(jnp.sum(jnp.square(metrics["grad_norm"]))),
            "skipped": metrics["skipped"].any(),
        }
        metrics = metrics | {"learning_rate": metrics["learning_rate"] * jnp.array(self.learning_rate_ratios)}
        each = {f"{name}/{key}": one[number] for number, name in enumerate(self.rows) for key, one in metrics.items()}
        return together | each


def make_multi_adapter(config: RunConfig) -> MultiAdapter | None:
    """Of a run with several adapters; None: of one, or none."""
    return MultiAdapter(rows_of(config), learning_rates(config)) if config.adapters else None


def sharded_product(name: str, mesh: Mesh) -> Callable[..., jax.Array]:
    """`product(x, weights, own, inputs=)` by the name in `adapter.product`, of rows that `mesh` cuts.

    Rows of a shard are in order where those of the batch are, so `ragged` works on each shard's by themselves.
    """
    product = PRODUCTS[name]
    rows, tokens = tuple(axis for axis in ("data", "fsdp") if mesh.shape[axis] > 1), None
    if mesh.shape["seq"] > 1:
        tokens = "seq"
    taken = {*rows, *([tokens] if tokens else [])}
    if name == "gathered" or not taken:
        return product

    def cut(x: jax.Array, weights: jax.Array, own: jax.Array, *, inputs: int) -> jax.Array:
        where = PartitionSpec(rows or None, tokens)
        return jax.shard_map(
            partial(product, inputs=inputs),
            mesh=mesh,
            in_specs=(where, PartitionSpec(), PartitionSpec(rows or None)),
            out_specs=where,
            axis_names=taken,
        )(x, weights, own)

    return cut
