"""Gradient engines: the plain one and gradient accumulation, behind one signature.

    engine(params, frozen, batch, keys) -> Sums(loss, weight, gradient, metrics)

Sums, not means: they add over microbatches and devices, and the step divides once, so that
loss = sum(weight * nll) / sum(weight) over the global batch however it was cut.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Batch = dict[str, jax.Array]
Loss = Callable[[Any, Any, Batch, jax.Array | None], tuple[jax.Array, tuple[jax.Array, dict[str, jax.Array]]]]


class Sums(NamedTuple):
    """What a pass over (a part of) the global batch adds up to."""

    loss: jax.Array  # sum of weight * nll
    weight: jax.Array  # sum of weights
    gradient: Any  # of `loss` by the trained parameters
    metrics: dict[str, jax.Array]  # further sums


Engine = Callable[[Any, Any, Batch, jax.Array | None], Sums]


def plain_engine(loss: Loss, *, dtype: Any = jnp.float32) -> Engine:
    """Loss and gradient of the whole batch at once; gradients are `dtype`. `loss` is (numerator, (weight, metrics)).

    Where these are of several adapters, the gradient of all together is that of each: none reads another's parameters.
    """

    def total(*given: Any) -> tuple[jax.Array, tuple]:
        numerator, rest = loss(*given)
        return jnp.sum(numerator), (numerator, *rest)

    def engine(params: Any, frozen: Any, batch: Batch, keys: jax.Array | None) -> Sums:
        (_, (numerator, weight, metrics)), gradient = jax.value_and_grad(total, has_aux=True)(
            params, frozen, batch, keys
        )
        return Sums(numerator, weight, jax.tree.map(lambda leaf: leaf.astype(dtype), gradient), metrics)

    return engine


def accumulate_gradients(engine: Engine, *, microbatches: int) -> Engine:
    """`engine` over `microbatches` parts of the batch, one after another; with one part it is `engine` itself.

    Part i takes rows i, i + microbatches, ...: every device keeps the rows it has.
    """
    if microbatches == 1:
        return engine

    def parts(leaf: jax.Array) -> jax.Array:
        return jnp.moveaxis(leaf.reshape(-1, microbatches, *leaf.shape[1:]), 1, 0)

    def run(params: Any, frozen: Any, batch: Batch, keys: jax.Array | None) -> Sums:
        def body(total: Sums, part: tuple[Batch, jax.Array | None]) -> tuple[Sums, None]:
            return jax.tree.map(jnp.add, total, engine(params, frozen, *part)), None

        cut = jax.tree.map(parts, (batch, keys))
        shapes = jax.eval_shape(engine, params, frozen, *jax.tree.map(lambda leaf: leaf[0], cut))
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        return jax.lax.scan(body, zeros, cut)[0]

    return run
