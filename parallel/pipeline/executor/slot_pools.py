"""Pools: the slots in which a device keeps what one op makes and a later one reads.

    pool [slots, repeats, ...]      on the device, or in host memory where the memory policy offloads the value

Values are written to and read from a pool in host memory by slices, and the op that reads one fetches it: a form that
the compiler turns into copies beside the computation.
"""

import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Shape = jax.core.ShapedArray  # an array's shape, dtype and memory space


def on_host(value: Shape) -> bool:
    """Whether the value waits in host memory."""
    return value.memory_space == jax.memory.Space.Host


def empty_pool(value: Shape, *, slots: int, repeats: int) -> jax.Array:
    """A pool [slots, repeats, ...] for values like `value`."""
    shape = (slots, repeats, *value.shape)
    if on_host(value):  # allocated there, not filled: zeros would be made on the device first
        return jax.device_put(jax.lax.empty(shape, value.dtype), jax.memory.Space.Host)
    return jnp.zeros(shape, value.dtype)


def write_slot(pools: list[jax.Array], slot: jax.Array, repeat: jax.Array, values: list[jax.Array]) -> list[jax.Array]:
    """`pools` [slots, repeats, ...] with `values`, one for each, at (slot, repeat)."""
    return [
        jax.lax.dynamic_update_slice(pool, value[None, None], _start(pool, slot, repeat))
        for pool, value in zip(pools, values, strict=True)
    ]


def read_slot(pools: list[jax.Array], slot: jax.Array, repeat: jax.Array) -> list[jax.Array]:
    """The value of each of `pools` [slots, repeats, ...] at (slot, repeat)."""
    return [jax.lax.dynamic_slice(pool, _start(pool, slot, repeat), (1, 1, *pool.shape[2:]))[0, 0] for pool in pools]


def _start(pool: jax.Array, slot: jax.Array, repeat: jax.Array) -> tuple[Any, ...]:
    """The start index of (slot, repeat): an index for each dimension, all of one type."""
    return (slot, repeat, *np.zeros(pool.ndim - 2, slot.dtype))


def total_bytes(values: Iterable[Shape]) -> int:
    """Bytes of arrays like `values`."""
    return sum(math.prod(value.shape) * value.dtype.itemsize for value in values)
