"""Gradients that do not depend on how many devices computed them: bit for bit the same for every size of `data`.

Floating-point sums depend on their order, and a sum of devices' sums has another order on another mesh. Here a
microbatch is computed whole by one device, by a program whose shapes no mesh changes, and what the microbatches give is
added in one binary tree over their numbers: ((0 + 1) + (2 + 3)) + ((4 + 5) + (6 + 7)), with a last one that has no
partner passed up as it is. A device that holds an aligned block of 2^k microbatches adds up a whole subtree; the
subtrees meet in the same tree. Everything after that is computed from equal values on every device.

The equality is between CPUs of one kind; on a GPU the kernels would have to be deterministic, too.
Source: the computation consistency of ElasWave (arXiv:2510.00606), which it judges by the loss; the tree is ours.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from ...parallel.gradients import Batch, Engine, Sums


def tree_ordered_engine(engine: Engine, *, mesh: Mesh, microbatches: int) -> Engine:
    """`engine` on each of `microbatches` consecutive parts of the batch, by one device each, added in the fixed tree.

    `engine` must know of no mesh. `data` is the only axis of `mesh` above 1, divides `microbatches`, and leaves each
    device a power of two of them, or is 1 itself (`configs/checks/elastic_meshes.py` has checked it).
    """
    devices = mesh.shape["data"]
    own = microbatches // devices

    def on_device(params: Any, frozen: Any, batch: Batch, keys: jax.Array | None) -> Sums:
        parts = jax.tree.map(lambda leaf: leaf.reshape(own, -1, *leaf.shape[1:]), (batch, keys))
        sums = tree_accumulate(lambda part: engine(params, frozen, *part), parts, count=own)
        return jax.tree.map(partial(tree_all_reduce, devices=devices), sums)

    rows, repeated = PartitionSpec("data"), PartitionSpec()
    mapped = jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(repeated, repeated, rows, rows),
        out_specs=repeated,
        check_vma=False,  # a gathered sum is the same everywhere, which the types cannot tell
    )

    def run(params: Any, frozen: Any, batch: Batch, keys: jax.Array | None) -> Sums:
        # The barriers keep the optimizer's arithmetic apart from ours, and so the same whatever comes before it.
        return jax.lax.optimization_barrier(mapped(*jax.lax.optimization_barrier((params, frozen, batch, keys))))

    return run


def tree_accumulate(function: Callable[[Any], Sums], parts: Any, *, count: int) -> Sums:
    """`function` of each of the `count` parts [count, ...], one after another, added in the tree.

    A binary counter: slot b holds the sum of 2^b consecutive parts, so log2(count) + 1 sums are alive at most.
    """

    def landing(level: int) -> Callable[[list[Sums], Sums], list[Sums]]:
        """The part whose number ends in `level` ones completes the subtrees below, and lands in slot `level`."""

        def land(slots: list[Sums], new: Sums) -> list[Sums]:
            for slot in slots[:level]:
                new = add_sums(slot, new)
            return [*slots[:level], new, *slots[level + 1 :]]

        return land

    def body(number: jax.Array, slots: list[Sums]) -> list[Sums]:
        part = jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, number, keepdims=False), parts)
        new = jax.lax.optimization_barrier(function(jax.lax.optimization_barrier(part)))
        return jax.lax.switch(trailing_ones(number), [landing(level) for level in range(len(slots))], slots, new)

    if count == 1:  # the compiler knows what an index into one is, and would compile a loop over nothing new otherwise
        parts = jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf]), parts)
    shapes = jax.eval_shape(function, jax.tree.map(lambda leaf: leaf[0], parts))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    # The compiler must not know the number of turns: it would unroll a loop of one, and compile another program.
    turns = jax.lax.optimization_barrier(jnp.int32(count))
    slots = jax.lax.fori_loop(0, turns, body, [zeros] * count.bit_length())
    full = [slot for level, slot in enumerate(slots) if count >> level & 1]
    total = full[0]
    for slot in full[1:]:
        total = add_sums(slot, total)
    return total


def trailing_ones(number: jax.Array) -> jax.Array:
    """How many ones the binary number ends with: 0 for 0b110, 2 for 0b011."""
    return jax.lax.population_count(number & ~(number + 1))


def add_sums(left: Sums, right: Sums) -> Sums:
    """The sum of two nodes of the tree."""
    return jax.tree.map(jnp.add, left, right)


def tree_all_reduce(leaf: jax.Array, *, devices: int) -> jax.Array:
    """The sum of all devices' `leaf` in the tree over their numbers, on every device.

    Each adds up one share of the elements: what a reduce-scatter and an all-gather send, in an order of ours.
    """
    if devices == 1:
        return leaf
    share = -(-leaf.size // devices)
    padded = jnp.pad(leaf.reshape(-1), (0, share * devices - leaf.size)).reshape(devices, share)
    theirs = jax.lax.all_to_all(padded, "data", split_axis=0, concat_axis=0)  # [devices, share]: one of each
    summed = jax.lax.all_gather(tree_sum(list(theirs)), "data", tiled=True)
    return summed[: leaf.size].reshape(leaf.shape)


def tree_sum(nodes: Sequence[jax.Array]) -> jax.Array:
    """The root of the tree over `nodes`: neighbours are added, one without a partner is passed up."""
    while len(nodes) > 1:
        nodes = [sum(nodes[i + 1 : i + 2], nodes[i]) for i in range(0, len(nodes), 2)]
    return nodes[0]
