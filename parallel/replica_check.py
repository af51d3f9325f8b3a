"""Silent corruption: what several devices hold of a state must be the same bits on each, and a device can err.

Each device makes a fingerprint of every array it holds, where it holds it; only these travel, and those of the same
part of the same array are compared.

    F(x) = sum over i of bits(x_i) (2654435761 i | 1)   mod 2**32      i: place in the device's part, C order

The factors are odd, hence invertible: a difference in one element is seen for certain, more of them go unseen once in
2**32. No float is added, so the order does not matter.
"""

from collections import Counter
from dataclasses import dataclass
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from .sharding import path_name

SPREAD = 2654435761  # Knuth's multiplicative hash: neighbours get unrelated factors


@dataclass(frozen=True)
class ReplicaMismatch:
    """A part of an array that is not the same on all devices that hold it."""

    path: str
    suspects: tuple[jax.Device, ...]  # that hold what most do not; all of them where no value has a majority
    majority: tuple[jax.Device, ...]  # that agree with each other

    def __str__(self) -> str:
        if not self.majority:
            return f"{self.path} differs between {told(self.suspects)}"
        return f"{self.path} is other bits on {told(self.suspects)} than on {told(self.majority)}"


class ReplicaCheck:
    """Compares what devices of `mesh` hold twice of states with these `shapes` and `shardings`.

    Arrays that live in the host's memory are no device's, and left out.
    """

    def __init__(self, shapes: Any, shardings: Any, mesh: Mesh) -> None:
        paths = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(shapes)]
        leaves = list(zip(paths, jax.tree.leaves(shapes), jax.tree.leaves(shardings), strict=True))
        self._mesh = mesh
        self._taken = [number for number, (_, _, where) in enumerate(leaves) if on_device(where)]
        self._parts = [(leaves[number][0], sharers(*leaves[number][1:], mesh)) for number in self._taken]
        specs = [leaves[number][2].spec for number in self._taken]
        each = jax.shard_map(
            fingerprints,
            mesh=mesh,
            in_specs=(specs,),
            out_specs=PartitionSpec(mesh.axis_names),
            check_vma=False,  # what is said to be the same on several devices is what is in doubt
        )
        self._fingerprints = jax.jit(each, out_shardings=NamedSharding(mesh, PartitionSpec()))

    @property
    def has_replicas(self) -> bool:
        """Whether several devices hold the same part of anything."""
        return any(len(rows) > 1 for _, groups in self._parts for rows in groups)

    def find_mismatches(self, state: Any) -> list[ReplicaMismatch]:
        """What is not the same where it should be, the same list on every process; waits for the devices.

        Collective: every process asks at the same place.
        """
        leaves = jax.tree.leaves(state)
        table = np.asarray(self._fingerprints([leaves[number] for number in self._taken]))  # [devices, arrays]
        devices = self._mesh.devices.reshape(-1)
        return [
            difference(path, [devices[row] for row in rows], table[rows, column])
            for column, (path, groups) in enumerate(self._parts)
            for rows in groups
            if len(set(table[rows, column].tolist())) > 1
        ]


def fingerprints(parts: list[jax.Array]) -> jax.Array:
    """Of a device's part of each array: [1, arrays] uint32."""
    return jnp.stack([fingerprint(part) for part in parts])[None]


def fingerprint(part: jax.Array) -> jax.Array:
    """F of `part`'s bits, uint32."""
    words = bits(part).reshape(-1).astype(jnp.uint32)
    place = jax.lax.iota(jnp.uint32, words.size)
    return jnp.sum(words * (place * jnp.uint32(SPREAD) | jnp.uint32(1)), dtype=jnp.uint32)


def bits(part: jax.Array) -> jax.Array:
    """The bits of `part` as unsigned integers of at most 32, wider ones cut into several."""
    if part.dtype == jnp.bool_:
        return part.astype(jnp.uint8)
    width = jnp.finfo(part.dtype).bits if jnp.issubdtype(part.dtype, jnp.floating) else jnp.iinfo(part.dtype).bits
    return jax.lax.bitcast_convert_type(part, jnp.dtype(f"uint{min(width, 32)}"))


def sharers(like: Any, where: NamedSharding, mesh: Mesh) -> list[list[int]]:
    """The devices, by place in the mesh, that hold the same part of an array; a list for each part."""
    groups: dict[Any, list[int]] = {}
    index = where.devices_indices_map(tuple(like.shape))
    for row, device in enumerate(mesh.devices.reshape(-1)):
        part = tuple(span.indices(size) for span, size in zip(index[device], like.shape, strict=True))
        groups.setdefault(part, []).append(row)
    return list(groups.values()) if prod(like.shape) else []


def difference(path: str, devices: list[jax.Device], seen: np.ndarray) -> ReplicaMismatch:
    """Who is to blame where `devices` saw different things of a part: those that most do not agree with."""
    (common, count), *_ = Counter(seen.tolist()).most_common(1)
    if 2 * count <= len(devices):
        return ReplicaMismatch(path, tuple(devices), ())
    alike = [value == common for value in seen.tolist()]
    return ReplicaMismatch(
        path,
        tuple(device for device, same in zip(devices, alike, strict=True) if not same),
        tuple(device for device, same in zip(devices, alike, strict=True) if same),
    )


def on_device(where: NamedSharding) -> bool:
    """Whether an array is in the devices' own memory."""
    return where.memory_kind in (None, *(device.default_memory().kind for device in where.device_set))


def told(devices: tuple[jax.Device, ...]) -> str:
    """Devices in words."""
    numbers = ", ".join(str(device.id) for device in devices)
    processes = sorted({device.process_index for device in devices})
    return f"devices {numbers} (process {', '.join(map(str, processes))})"
