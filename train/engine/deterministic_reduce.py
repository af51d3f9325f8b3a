"""Gradients that are bit for bit the same for every size of the mesh axis `data`.

Floating-point sums depend on their order, and a sum over devices has another order on another mesh. Here one device
computes a whole microbatch, by a program whose shapes no mesh changes. The results are added in one binary tree over
the numbers of the microbatches: ((0 + 1) + (2 + 3)) + ((4 + 5) + (6 + 7)); a last node without a partner is passed up
as it is. A device that holds an aligned block of 2^k microbatches adds up a whole subtree, and the subtrees are added
in the same tree. Everything after that is computed from equal values on every device.

The equality holds between CPUs of one kind; on a GPU the kernels would have to be deterministic, too.
Source: the computation consistency of ElasWave (arXiv:2510.00606), which compares losses only; the tree is ours.
"""

from collections.abc import Callable, Sequence
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from ...parallel.gradients import Batch, Engine, Sums


def tree_ordered_engine(engine: Engine, *, mesh: Mesh, microbatches: int) -> Engine:
    """`engine` on each of `microbatches` consecutive parts of the batch, each on one device, added in the tree.

    `engine` must not depend on a mesh. `data` is the only axis of `mesh` above 1. It divides `microbatches`, and each
    device gets a power of two of them unless `data` is 1 (`configs/checks/elastic_meshes.py` has checked it).
    """
    devices = mesh.shape["data"]
    device_microbatches = microbatches // devices

    def on_device(params: Any, frozen: Any, batch: Batch, keys: jax.Array | None) -> Sums:
        parts = jax.tree.map(lambda leaf: leaf.reshape(device_microbatches, -1, *leaf.shape[1:]), (batch, keys))
        sums = tree_accumulate(lambda part: engine(params, frozen, *part), parts, count=device_microbatches)
        return jax.tree.map(partial(tree_all_reduce, devices=devices), sums)

    rows, replicated = PartitionSpec("data"), PartitionSpec()
    mapped = jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(replicated, replicated, rows, rows),
        out_specs=replicated,
        check_vma=False,  # a gathered sum is equal on all devices, which the type checker cannot know
    )

    def run(params: Any, frozen: Any, batch: Batch, keys: jax.Array | None) -> Sums:
        # The barriers keep the compiler from fusing this with the optimizer, whose arithmetic could then differ.
        return jax.lax.optimization_barrier(mapped(*jax.lax.optimization_barrier((params, frozen, batch, keys))))

    return run


def tree_accumulate(function: Callable[[Any], Sums], parts: Any, *, count: int) -> Sums:
    """Apply `function` to each of the `count` parts [count, ...], one after another, and add the results in the tree.

    This is a binary counter: slot b holds the sum of 2^b consecutive parts, so at most log2(count) + 1 sums are alive.
    """

    def add_at(level: int, slots: list[Sums], new: Sums) -> list[Sums]:
        """A part whose number ends in `level` ones completes the subtrees below; the sum goes into slot `level`."""
        for slot in slots[:level]:
            new = add_sums(slot, new)
        return [*slots[:level], new, *slots[level + 1 :]]

    def body(number: jax.Array, slots: list[Sums]) -> list[Sums]:
        part = jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, number, keepdims=False), parts)
        new = jax.lax.optimization_barrier(function(jax.lax.optimization_barrier(part)))
        trailing_ones = jax.lax.population_count(number & ~(number + 1))  # 0 for 0b110, 2 for 0b011
        return jax.lax.switch(trailing_ones, [partial(add_at, level) for level in range(len(slots))], slots, new)

    if count == 1:  # else the compiler would see through an index into one part, and compile another program
        parts = jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf]), parts)
    shapes = jax.eval_shape(function, jax.tree.map(lambda leaf: leaf[0], parts))
    zeros = jax.tree.map(jnp.zeros_like, shapes)
    # The compiler must not know the number of rounds: it would unroll a loop of one, and compile another program.
    rounds = jax.lax.optimization_barrier(jnp.int32(count))
    slots = jax.lax.fori_loop(0, rounds, body, [zeros] * count.bit_length())
    subtrees = [slot for level, slot in enumerate(slots) if count >> level & 1]
    return reduce(lambda total, slot: add_sums(slot, total), subtrees)


def add_sums(a: Sums, b: Sums) -> Sums:
    """Add two nodes of the tree."""
    return jax.tree.map(jnp.add, a, b)


def tree_all_reduce(leaf: jax.Array, *, devices: int) -> jax.Array:
    """The sum of `leaf` over all devices, added in the tree over their numbers; the result is on every device.

    Each device adds up one shard of the elements. This sends as much as a reduce-scatter and an all-gather do.
    """
    if devices == 1:
        return leaf
    size = -(-leaf.size // devices)
    padded = jnp.pad(leaf.reshape(-1), (0, size * devices - leaf.size)).reshape(devices, size)
    shards = jax.lax.all_to_all(padded, "data", split_axis=0, concat_axis=0)  # [devices, size]: one of each device
    summed = jax.lax.all_gather(tree_sum(list(shards)), "data", tiled=True)
    return summed[: leaf.size].reshape(leaf.shape)


def tree_sum(nodes: Sequence[jax.Array]) -> jax.Array:
    """The root of the tree over `nodes`: neighbours are added, a node without a partner is passed up."""
    while len(nodes) > 1:
        nodes = [sum(nodes[i + 1 : i + 2], nodes[i]) for i in range(0, len(nodes), 2)]
    return nodes[0]
