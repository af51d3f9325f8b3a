"""Finds silent data corruption: several devices that hold the same shard of an array must hold the same bits.

Each device computes a fingerprint of its shard of every array; only fingerprints are sent, and those of the same shard
of the same array are compared.

    F(x) = sum over i of bits(x_i) (2654435761 i | 1)   mod 2**32      i: index in the shard, C order

The factors are odd, hence invertible: a difference in one element is always found; differences in several elements are
missed once in 2**32. No float is added, so the order of the sum does not matter.
"""

from collections import Counter
from dataclasses import dataclass
from itertools import compress
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from .sharding import path_name

MULTIPLIER = 2654435761  # Knuth's multiplicative hash: neighbours get unrelated factors


@dataclass(frozen=True)
class ReplicaMismatch:
    """A shard of an array that is not the same on all devices that hold it."""

    path: str
    suspects: tuple[jax.Device, ...]  # those that differ from the majority; all of them if there is no majority
    majority: tuple[jax.Device, ...]  # those with the most common bits; () if there is no majority

    def __str__(self) -> str:
        if not self.majority:
            return f"{self.path} differs between {describe_devices(self.suspects)}"
        suspects, majority = describe_devices(self.suspects), describe_devices(self.majority)
        return f"{self.path} has other bits on {suspects} than on {majority}"


class ReplicaCheck:
    """Compares the shards that several devices of `mesh` hold, of states with these `shapes` and `shardings`.

    Arrays in host memory are left out.
    """

    def __init__(self, shapes: Any, shardings: Any, mesh: Mesh) -> None:
        paths = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(shapes)]
        leaves = list(zip(paths, jax.tree.leaves(shapes), jax.tree.leaves(shardings), strict=True))
        self._mesh = mesh
        self._checked = [number for number, (_, _, sharding) in enumerate(leaves) if on_device(sharding)]
        self._groups = [(leaves[number][0], replica_groups(*leaves[number][1:], mesh)) for number in self._checked]
        specs = [leaves[number][2].spec for number in self._checked]
        per_device = jax.shard_map(
            fingerprints,
            mesh=mesh,
            in_specs=(specs,),
            out_specs=PartitionSpec(mesh.axis_names),
            check_vma=False,  # it would assume what this check is for: that replicated arrays are equal
        )
        self._fingerprints = jax.jit(per_device, out_shardings=NamedSharding(mesh, PartitionSpec()))

    @property
    def has_replicas(self) -> bool:
        """Whether several devices hold the same shard of any array."""
        return any(len(rows) > 1 for _, groups in self._groups for rows in groups)

    def find_mismatches(self, state: Any) -> list[ReplicaMismatch]:
        """The shards that differ between devices, the same list on every process; waits for the devices.

        Collective: every process must call it.
        """
        leaves = jax.tree.leaves(state)
        table = np.asarray(self._fingerprints([leaves[number] for number in self._checked]))  # [devices, arrays]
        devices = self._mesh.devices.reshape(-1)
        return [
            majority_vote(path, [devices[row] for row in rows], table[rows, column])
            for column, (path, groups) in enumerate(self._groups)
            for rows in groups
            if len(set(table[rows, column].tolist())) > 1
        ]


def fingerprints(shards: list[jax.Array]) -> jax.Array:
    """The fingerprints of a device's shards: [1, arrays] uint32."""
    return jnp.stack([fingerprint(shard) for shard in shards])[None]


def fingerprint(shard: jax.Array) -> jax.Array:
    """F of the bits of `shard`, uint32."""
    words = as_unsigned(shard).reshape(-1).astype(jnp.uint32)
    index = jax.lax.iota(jnp.uint32, words.size)
    return jnp.sum(words * (index * jnp.uint32(MULTIPLIER) | jnp.uint32(1)), dtype=jnp.uint32)


def as_unsigned(array: jax.Array) -> jax.Array:
    """The bits of `array` as unsigned integers of at most 32 bits; wider elements become several."""
    if array.dtype == jnp.bool_:
        return array.astype(jnp.uint8)
    width = jnp.finfo(array.dtype).bits if jnp.issubdtype(array.dtype, jnp.floating) else jnp.iinfo(array.dtype).bits
    return jax.lax.bitcast_convert_type(array, jnp.dtype(f"uint{min(width, 32)}"))


def replica_groups(like: Any, sharding: NamedSharding, mesh: Mesh) -> list[list[int]]:
    """For each shard of an array shaped as `like`, the devices that hold it, by their index in the mesh."""
    groups: dict[Any, list[int]] = {}
    indices = sharding.devices_indices_map(tuple(like.shape))
    for row, device in enumerate(mesh.devices.reshape(-1)):
        shard = tuple(span.indices(size) for span, size in zip(indices[device], like.shape, strict=True))
        groups.setdefault(shard, []).append(row)
    return list(groups.values()) if prod(like.shape) else []


def majority_vote(path: str, devices: list[jax.Device], values: np.ndarray) -> ReplicaMismatch:
    """The mismatch of `devices` whose fingerprints of one shard are `values`."""
    (common, count), *_ = Counter(values.tolist()).most_common(1)
    if 2 * count <= len(devices):
        return ReplicaMismatch(path, tuple(devices), ())
    agrees = values == common
    return ReplicaMismatch(path, tuple(compress(devices, ~agrees)), tuple(compress(devices, agrees)))


def on_device(sharding: NamedSharding) -> bool:
    """Whether an array is in the devices' own memory."""
    return sharding.memory_kind in (None, *(device.default_memory().kind for device in sharding.device_set))


def describe_devices(devices: tuple[jax.Device, ...]) -> str:
    """Numbers and processes of devices, for messages."""
    numbers = ", ".join(str(device.id) for device in devices)
    processes = sorted({device.process_index for device in devices})
    return f"devices {numbers} (process {', '.join(map(str, processes))})"
