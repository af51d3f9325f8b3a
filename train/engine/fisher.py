"""Squared gradients of single examples, by which FishMask chooses: the empirical Fisher information. arXiv:2111.09839

    F = sum over examples of (d loss(example) / d w)^2             the loss of a document is -log p of what is learned

An example is a document of a packed row, or what of one lies in it; where answers are compared it is their pair. No
document sees another, so an example's gradient is that of its row where nothing but the example counts. One row at a
time passes through a device, once for each of its examples: exact for every recipe whose loss is a sum over examples,
and for all weights, those that are used twice too. The gradient of an example is there whole, and one at a time.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from ...parallel.gradients import Batch, Engine, Loss, Sums
from ...parallel.state import TrainState
from ..optim.sparse_finetuning import is_extra_weight, map_with_path

ROWS = ("data", "fsdp")  # axes that share the rows of a batch

# (params, frozen, batch, keys, counts): what `squared` gives of a batch of which row i has counts[i] examples
OfRows = Callable[[Any, Any, Batch, jax.Array | None, jax.Array], Sums]


def per_example_squared_gradients(loss: Loss, *, segments: int) -> OfRows:
    """Sums whose gradient is that of squares; what a recipe adds of its own has its gradient as it is.

    An example has `segments` segments of its row.
    """

    def run(params: Any, frozen: Any, batch: Batch, keys: jax.Array | None, counts: jax.Array) -> Sums:
        def of_example(row: Batch, key: jax.Array | None, number: jax.Array) -> Sums:
            counted = jnp.where(example_ids(row, segments) == number, row["loss_weights"], 0)
            own = row | {"loss_weights": counted}
            (numerator, (weight, metrics)), gradient = jax.value_and_grad(loss, has_aux=True)(params, frozen, own, key)
            return Sums(numerator, weight, map_with_path(square_if_maskable, gradient), metrics)

        def of_row(total: Sums, one: tuple[tuple[Batch, jax.Array | None], jax.Array]) -> tuple[Sums, None]:
            row, count = one

            def add(number: jax.Array, total: Sums) -> Sums:
                return jax.tree.map(jnp.add, total, of_example(*row, number))

            return jax.lax.fori_loop(1, count + 1, add, total), None

        rows = jax.tree.map(lambda leaf: leaf[:, None], (batch, keys))
        shapes = jax.eval_shape(of_example, *jax.tree.map(lambda leaf: leaf[0], rows), counts[0])
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        return jax.lax.scan(of_row, zeros, (rows, counts))[0]

    return run


def example_ids(batch: Batch, segments: int) -> jax.Array:
    """Number of the example in its row that each token belongs to, from 1 on; 0 is padding."""
    return (batch["segment_ids"] + segments - 1) // segments


def square_if_maskable(path: str, gradient: jax.Array) -> jax.Array:
    """The square, float32, of a gradient by a weight that is chosen among; any other as it is."""
    wide = gradient.astype(jnp.float32)
    return wide if is_extra_weight(path) else jnp.square(wide)


def single_device_engine(of_rows: OfRows, *, segments: int) -> Engine:
    """`of_rows` on one device."""

    def engine(params: Any, frozen: Any, batch: Batch, keys: jax.Array | None) -> Sums:
        return of_rows(params, frozen, batch, keys, example_ids(batch, segments).max(axis=1))

    return engine


def shard_over_data(of_rows: OfRows, *, segments: int, mesh: Mesh) -> Engine:
    """`of_rows` by each device of `mesh` for the rows it has; what cuts a row or a weight otherwise, still does."""
    devices = mesh.shape["data"] * mesh.shape["fsdp"]
    if devices == 1:
        return single_device_engine(of_rows, segments=segments)

    def on_device(*given: Any) -> Sums:
        return jax.tree.map(lambda leaf: jax.lax.psum(leaf, ROWS), of_rows(*given))

    rows, repeated = PartitionSpec(ROWS), PartitionSpec()
    mapped = jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(repeated, repeated, rows, rows, repeated),
        out_specs=repeated,
        axis_names=set(ROWS),
        check_vma=False,  # a gradient is of one device's example, and is not to be added up before it is squared
    )

    def engine(params: Any, frozen: Any, batch: Batch, keys: jax.Array | None) -> Sums:
        # As many turns on every device: some of them may wait for each other in each.
        counts = example_ids(batch, segments).max(axis=1).reshape(devices, -1).max(axis=0)
        return mapped(params, frozen, batch, keys, counts)

    return engine


def two_phase_engine(
    searched: Callable[[TrainState], jax.Array], examples: Engine, engine: Engine
) -> tuple[Engine, Callable]:
    """(an engine, what it is told of the state): `engine` once `searched(state)`, before it the roots of squares.

    The step divides by the weight; what comes out of that are the roots themselves, whatever a batch weighs.
    """

    def rooted(*given: Any) -> Sums:
        sums = examples(*given)
        weight = jnp.maximum(sums.weight, 1e-9)
        roots = map_with_path(
            lambda path, leaf: leaf if is_extra_weight(path) else weight * jnp.sqrt(leaf), sums.gradient
        )
        return sums._replace(gradient=roots)

    def plain(*given: Any) -> Sums:
        sums = engine(*given)
        return sums._replace(gradient=jax.tree.map(lambda leaf: leaf.astype(jnp.float32), sums.gradient))

    def run(params: Any, frozen: Any, batch: Batch, keys: jax.Array | None, *, ready: jax.Array) -> Sums:
        return jax.lax.cond(ready, plain, rooted, params, frozen, batch, keys)

    return run, lambda state: {"ready": searched(state)}
