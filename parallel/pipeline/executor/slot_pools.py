"""Pools: the slots in which a device keeps what one op makes and a later one reads.

    pool [slots, repeats, ...]      on the device, or in host memory where the memory policy offloads the value

A value is put into and taken from a pool in host memory by slices, and fetched by the op that reads it: what the
compiler knows how to do as copies beside the computation.
"""

import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Shape = jax.core.ShapedArray  # an array's shape, dtype and memory space


def on_host(one: Shape) -> bool:
    """Whether the value waits in host memory."""
    return one.memory_space == jax.memory.Space.Host


def empty(one: Shape, *, slots: int, repeats: int) -> jax.Array:
    """A pool [slots, repeats, ...] for values like `one`."""
    shape = (slots, repeats, *one.shape)
    if on_host(one):  # allocated there, not filled: zeros would be made on the device first
        return jax.device_put(jax.lax.empty(shape, one.dtype), jax.memory.Space.Host)
    return jnp.zeros(shape, one.dtype)


def put(pool: list[jax.Array], slot: jax.Array, number: jax.Array, new: list[jax.Array]) -> list[jax.Array]:
    """Each of `pool` [slots, repeats, ...] with its part of `new` at (slot, repeat `number`)."""
    return [
        jax.lax.dynamic_update_slice(whole, part[None, None], place(whole, slot, number))
        for whole, part in zip(pool, new, strict=True)
    ]


def taken(pool: list[jax.Array], slot: jax.Array, number: jax.Array) -> list[jax.Array]:
    """What was put into each of `pool` [slots, repeats, ...] at (slot, repeat `number`)."""
    return [jax.lax.dynamic_slice(whole, place(whole, slot, number), (1, 1, *whole.shape[2:]))[0, 0] for whole in pool]


def place(whole: jax.Array, slot: jax.Array, number: jax.Array) -> tuple[Any, ...]:
    """Where a pool's value at (slot, repeat `number`) begins: an index for each dimension, all of one type."""
    return (slot, number, *np.zeros(whole.ndim - 2, slot.dtype))


def size(shapes: Iterable[Shape]) -> int:
    """Bytes of arrays of these shapes."""
    return sum(math.prod(one.shape) * one.dtype.itemsize for one in shapes)
