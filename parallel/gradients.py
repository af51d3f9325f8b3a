"""Gradient engines: the plain one and gradient accumulation, behind one signature.

    engine(params, frozen, batch, keys) -> Sums(loss, weight, gradient, metrics)

Sums, not means: they add over microbatches and devices, and the step divides once, so that
loss = sum(weight * nll) / sum(weight) over the global batch, whatever the split.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Batch = dict[str, jax.Array]
Loss = Callable[[Any, Any, Batch, jax.Array | None], tuple[jax.Array, tuple[jax.Array, dict[str, jax.Array]]]]


class Sums(NamedTuple):
    """The sums over (a part of) the global batch."""

    loss: jax.Array  # sum of weight * nll
    weight: jax.Array  # sum of weights
    gradient: Any  # of `loss` by the trained parameters
    metrics: dict[str, jax.Array]  # further sums


Engine = Callable[[Any, Any, Batch, jax.Array | None], Sums]


def plain_engine(loss: Loss, *, dtype: Any = jnp.float32) -> Engine:
    """Loss and gradient of the whole batch at once; gradients are `dtype`. `loss` is (numerator, (weight, metrics)).

    With several adapters these are [adapters]. The gradient of their sum is that of each: none reads another's weights.
    """

    def total(*arguments: Any) -> tuple[jax.Array, tuple]:
        numerator, sums = loss(*arguments)
        return jnp.sum(numerator), (numerator, *sums)

    def engine(params: Any, frozen: Any, batch: Batch, keys: jax.Array | None) -> Sums:
        (_, (numerator, weight, metrics)), gradient = jax.value_and_grad(total, has_aux=True)(
            params, frozen, batch, keys
        )
        return Sums(numerator, weight, jax.tree.map(lambda leaf: leaf.astype(dtype), gradient), metrics)

    return engine


def accumulate_gradients(engine: Engine, *, microbatches: int) -> Engine:
    """`engine` over `microbatches` parts of the batch, one after another; for a single one it is `engine` itself.

    Microbatch i takes rows i, i + microbatches, ...: no row moves to another device.
    """
    if microbatches == 1:
        return engine

    def split(leaf: jax.Array) -> jax.Array:
        return jnp.moveaxis(leaf.reshape(-1, microbatches, *leaf.shape[1:]), 1, 0)

    def run(params: Any, frozen: Any, batch: Batch, keys: jax.Array | None) -> Sums:
        def add_microbatch(total: Sums, inputs: tuple[Batch, jax.Array | None]) -> tuple[Sums, None]:
            return jax.tree.map(jnp.add, total, engine(params, frozen, *inputs)), None

        inputs = jax.tree.map(split, (batch, keys))
        shapes = jax.eval_shape(engine, params, frozen, *jax.tree.map(lambda leaf: leaf[0], inputs))
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        return jax.lax.scan(add_microbatch, zeros, inputs)[0]

    return run
