"""A device whose memory flips a bit, for tests."""

import dataclasses

import jax
import numpy as np


def flip_bit(array, device, bit):
    """`array` with one bit of what `device` holds of it flipped."""
    parts = []
    for shard in array.addressable_shards:
        part = np.array(shard.data)
        if shard.device == device:
            part.reshape(-1).view(np.uint8)[bit // 8] ^= 1 << bit % 8
        parts.append(jax.device_put(part, shard.device))
    return jax.make_array_from_single_device_arrays(array.shape, array.sharding, parts)


def flips(drain, *, step, device):
    """`Loop.drain`, with a bit of a parameter flipped after `step`, on this process's `device`-th device."""

    def damaged(loop, state):
        state = drain(loop, state)
        if int(state.step) != step:
            return state
        leaves, structure = jax.tree.flatten(state.params)
        largest = max(range(len(leaves)), key=lambda number: leaves[number].nbytes)
        leaves[largest] = flip_bit(leaves[largest], jax.local_devices()[device], 8 * 40 + 22)
        return dataclasses.replace(state, params=jax.tree.unflatten(structure, leaves))

    return damaged
