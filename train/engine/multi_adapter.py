"""Several adapters trained in one step, each as in a run of its own.

    gradients        one forward and one backward pass of the base over the rows of all adapters
    the update       a `vmap` over adapters of what follows in any step

The loss of a batch is [adapters], each over its own rows. No adapter reads the parameters of another one, so one
backward pass of the sum gives the gradient of each. Norm, clipping, health, decay, learning rate and optimizer state
are then each adapter's own: `single_adapter_run` in `configs/adapter_runs.py` is the run that makes the same updates.
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

from ...configs.adapter_runs import adapter_rows
from ...configs.names import ADAPTER_IDS_FIELD
from ...configs.run import RunConfig
from ...models.adapters.multi_lora import PRODUCTS, to_decoder_order
from ...parallel.gradients import Batch, Sums
from ...parallel.state import TrainState
from ..objectives.interface import RecipeLoss
from ..optim.optimizer_factory import ADAPTER_AXIS, learning_rate_ratios
from .step import ApplyUpdate


@dataclass(frozen=True)
class MultiAdapter:
    """Lifts functions of one adapter to several."""

    rows: dict[str, int]  # rows of a batch, by adapter
    learning_rate_ratios: tuple[float, ...]  # each adapter's learning rate / the run's

    def loss(self, recipe: RecipeLoss) -> RecipeLoss:
        """`recipe` whose numerator and weight are [adapters]."""

        def loss(values: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
            # A recipe sums over rows: compute each row by itself, then sum over the rows of each adapter.
            row_sums = jax.vmap(lambda *row: recipe(*jax.tree.map(lambda leaf: leaf[None], row)))(values, batch)
            is_own_row = batch[ADAPTER_IDS_FIELD][:, 0] == jnp.arange(len(self.rows))[:, None]
            # `where`, not a product: a row with NaN must not spoil the sums of other adapters.
            return tuple(jnp.where(is_own_row, sums, 0).sum(axis=1) for sums in row_sums)

        return loss

    def values(self, make_values: Callable[..., Callable[..., jax.Array]]) -> Callable[..., Callable[..., jax.Array]]:
        """`make_values` whose functions `(params, frozen, batch, keys)` take parameters as the state holds them."""

        def make(**options: Any) -> Callable[..., jax.Array]:
            values = make_values(**options)
            return lambda params, *rest: values(to_decoder_order(params), *rest)

        return make

    def row_ids(self) -> jax.Array:
        """The id of each row of the global batch among the rows of its adapter, which seeds dropout. [global_batch]"""
        return jnp.concatenate([jnp.arange(rows) for rows in self.rows.values()])

    def optimizer(self, optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
        """`optimizer` of each adapter."""
        update = jax.vmap(optimizer.update, axis_name=ADAPTER_AXIS)
        return optax.GradientTransformation(jax.vmap(optimizer.init), update)

    def apply_update(self, apply_update: ApplyUpdate) -> ApplyUpdate:
        """`apply_update` of each adapter; its metrics are those of all adapters, and `name/metric` of each."""

        def apply_all(sums: Sums, state: TrainState) -> tuple[TrainState, dict[str, jax.Array]]:
            def apply_one(sums: Sums, params: Any, opt_state: Any) -> tuple[Any, Any, dict[str, jax.Array]]:
                new, metrics = apply_update(sums, dataclasses.replace(state, params=params, opt_state=opt_state))
                return new.params, new.opt_state, metrics

            vmapped = jax.vmap(apply_one, axis_name=ADAPTER_AXIS)
            params, opt_state, metrics = vmapped(sums, state.params, state.opt_state)
            new = dataclasses.replace(state, step=state.step + 1, params=params, opt_state=opt_state)
            return new, self.flatten_metrics(metrics)

        return apply_all

    def flatten_metrics(self, metrics: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """Reduce metrics [adapters] over all adapters, weighted by tokens, and add `name/metric` of each adapter."""
        weights = metrics["tokens"] / jnp.maximum(metrics["tokens"].sum(), 1e-9)
        totals = {name: jnp.sum(weights * values) for name, values in metrics.items()}
        totals |= {
            "learning_rate": metrics["learning_rate"][0],
            "tokens": metrics["tokens"].sum(),
            "grad_norm": jnp.sqrt(jnp.sum(jnp.square(metrics["grad_norm"]))),
            "skipped": metrics["skipped"].any(),
        }
        metrics = metrics | {"learning_rate": metrics["learning_rate"] * jnp.array(self.learning_rate_ratios)}
        return totals | {
            f"{adapter}/{name}": values[number]
            for number, adapter in enumerate(self.rows)
            for name, values in metrics.items()
        }


def make_multi_adapter(config: RunConfig) -> MultiAdapter | None:
    """The lift of a run with several adapters; None for a run with at most one."""
    return MultiAdapter(adapter_rows(config), learning_rate_ratios(config)) if config.adapters else None


def sharded_product(name: str, mesh: Mesh) -> Callable[..., jax.Array]:
    """`product(x, weights, adapter_ids, inputs=)` by the name in `adapter.product`, for rows sharded over `mesh`.

    The rows of a shard are sorted by adapter if those of the batch are, so `ragged` works on each shard by itself.
    """
    product = PRODUCTS[name]
    row_axes = tuple(axis for axis in ("data", "fsdp") if mesh.shape[axis] > 1)
    token_axis = "seq" if mesh.shape["seq"] > 1 else None
    manual_axes = {*row_axes, *([token_axis] if token_axis else [])}
    if name == "gathered" or not manual_axes:
        return product

    def call_sharded(x: jax.Array, weights: jax.Array, adapter_ids: jax.Array, *, inputs: int) -> jax.Array:
        x_spec = PartitionSpec(row_axes or None, token_axis)
        return jax.shard_map(
            partial(product, inputs=inputs),
            mesh=mesh,
            in_specs=(x_spec, PartitionSpec(), PartitionSpec(row_axes or None)),
            out_specs=x_spec,
            axis_names=manual_axes,
        )(x, weights, adapter_ids)

    return call_sharded
