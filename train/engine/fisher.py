"""Squared gradients of single examples, from which FishMask chooses: the empirical Fisher information. arXiv:2111.09839

    F = sum over examples of (d loss(example) / d w)^2

An example is a document of a packed row, or the part of it in the row; for recipes that compare responses it is a pair.
No document attends to another, so the gradient of an example is that of its row if all other tokens have loss weight 0.
A device computes one row at a time, once for each of its examples. This is exact for every recipe whose loss is a sum
over examples, and for all weights, also those used twice. One example's full gradient is in memory at a time.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from ...parallel.gradients import Batch, Engine, Loss, Sums
from ...parallel.sharding import map_with_path
from ...parallel.state import TrainState
from ..optim.sparse_finetuning import is_extra_weight

ROW_AXES = ("data", "fsdp")  # mesh axes that split the rows of a batch

# (params, frozen, batch, keys, counts) -> sums over a batch whose row i has counts[i] examples
RowsSquaredGradients = Callable[[Any, Any, Batch, jax.Array | None, jax.Array], Sums]


def per_example_squared_gradients(loss: Loss, *, segments: int) -> RowsSquaredGradients:
    """Return a function whose `Sums.gradient` adds up squared gradients; extra weights keep their plain gradient.

    An example is `segments` consecutive segments of its row.
    """

    def run(params: Any, frozen: Any, batch: Batch, keys: jax.Array | None, counts: jax.Array) -> Sums:
        def example_sums(row: Batch, key: jax.Array | None, example: jax.Array) -> Sums:
            row = row | {"loss_weights": jnp.where(example_ids(row, segments) == example, row["loss_weights"], 0)}
            (numerator, (weight, metrics)), gradient = jax.value_and_grad(loss, has_aux=True)(params, frozen, row, key)
            return Sums(numerator, weight, map_with_path(square_if_maskable, gradient), metrics)

        def add_row(total: Sums, inputs: tuple[tuple[Batch, jax.Array | None], jax.Array]) -> tuple[Sums, None]:
            row_and_key, count = inputs

            def add_example(example: jax.Array, total: Sums) -> Sums:
                return jax.tree.map(jnp.add, total, example_sums(*row_and_key, example))

            return jax.lax.fori_loop(1, count + 1, add_example, total), None

        rows = jax.tree.map(lambda leaf: leaf[:, None], (batch, keys))
        shapes = jax.eval_shape(example_sums, *jax.tree.map(lambda leaf: leaf[0], rows), counts[0])
        return jax.lax.scan(add_row, jax.tree.map(jnp.zeros_like, shapes), (rows, counts))[0]

    return run


def example_ids(batch: Batch, segments: int) -> jax.Array:
    """The number of each token's example in its row, counted from 1; 0 is padding. [rows, sequence]"""
    return (batch["segment_ids"] + segments - 1) // segments


def square_if_maskable(path: str, gradient: jax.Array) -> jax.Array:
    """The gradient in float32, squared unless the weight at `path` is an extra one, which no mask covers."""
    gradient = gradient.astype(jnp.float32)
    return gradient if is_extra_weight(path) else jnp.square(gradient)


def single_device_engine(squared_gradients: RowsSquaredGradients, *, segments: int) -> Engine:
    """An engine that computes `squared_gradients` on one device."""

    def engine(params: Any, frozen: Any, batch: Batch, keys: jax.Array | None) -> Sums:
        return squared_gradients(params, frozen, batch, keys, example_ids(batch, segments).max(axis=1))

    return engine


def shard_over_data(squared_gradients: RowsSquaredGradients, *, segments: int, mesh: Mesh) -> Engine:
    """An engine whose devices along `data` and `fsdp` compute `squared_gradients` of their own rows."""
    devices = mesh.shape["data"] * mesh.shape["fsdp"]
    if devices == 1:
        return single_device_engine(squared_gradients, segments=segments)

    def on_device(*inputs: Any) -> Sums:
        return jax.tree.map(lambda leaf: jax.lax.psum(leaf, ROW_AXES), squared_gradients(*inputs))

    rows, replicated = PartitionSpec(ROW_AXES), PartitionSpec()
    mapped = jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(replicated, replicated, rows, rows, replicated),
        out_specs=replicated,
        axis_names=set(ROW_AXES),
        check_vma=False,  # with checks JAX would add up the gradients of devices before they are squared
    )

    def engine(params: Any, frozen: Any, batch: Batch, keys: jax.Array | None) -> Sums:
        # All devices make the same number of rounds, because collectives over other axes wait in each round.
        counts = example_ids(batch, segments).max(axis=1).reshape(devices, -1).max(axis=0)
        return mapped(params, frozen, batch, keys, counts)

    return engine


def two_phase_engine(
    is_final: Callable[[TrainState], jax.Array], squares_engine: Engine, engine: Engine
) -> tuple[Engine, Callable]:
    """Return (engine, extra inputs) of a run that first searches its mask: until `is_final(state)`, square roots of
    squared gradients; from then on what `engine` gives.

    The roots are multiplied by the weight of the batch, because the step divides by it.
    """

    def search(*inputs: Any) -> Sums:
        sums = squares_engine(*inputs)
        weight = jnp.maximum(sums.weight, 1e-9)
        return sums._replace(
            gradient=map_with_path(
                lambda path, leaf: leaf if is_extra_weight(path) else weight * jnp.sqrt(leaf), sums.gradient
            )
        )

    def train(*inputs: Any) -> Sums:
        sums = engine(*inputs)
        return sums._replace(gradient=jax.tree.map(lambda leaf: leaf.astype(jnp.float32), sums.gradient))

    def run(params: Any, frozen: Any, batch: Batch, keys: jax.Array | None, *, mask_final: jax.Array) -> Sums:
        return jax.lax.cond(mask_final, train, search, params, frozen, batch, keys)

    return run, lambda state: {"mask_final": is_final(state)}
