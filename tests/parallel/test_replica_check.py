"""Copies that should be equal: a flipped bit on one device is found, named, and blamed on that device."""

import random

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from support.corruption import flipped

from meshwright.parallel.replica_check import ReplicaCheck

MESH = Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("data", "fsdp"))
SPECS = {
    "whole": PartitionSpec(), "cut": PartitionSpec("fsdp"), "apart": PartitionSpec(("data", "fsdp")),
    "half": PartitionSpec(None, "fsdp"), "codes": PartitionSpec(), "count": PartitionSpec(), "flags": PartitionSpec(),
}  # fmt: skip


def state():
    draw = np.random.default_rng(0)
    values = {
        "whole": draw.random((6, 5), np.float32),
        "cut": draw.random((8, 3), np.float32),
        "apart": draw.random(16, np.float32),
        "half": draw.random((4, 6)).astype(ml_dtypes.bfloat16),
        "codes": draw.integers(-100, 100, 33, dtype=np.int8),
        "count": np.int32(7),
        "flags": np.array([True, False, True]),
    }
    return {name: jax.device_put(value, NamedSharding(MESH, SPECS[name])) for name, value in values.items()}


@pytest.fixture(scope="module")
def duplicates():
    whole = state()
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), whole)
    return ReplicaCheck(shapes, jax.tree.map(lambda leaf: leaf.sharding, whole), MESH)


def test_equal_copies_and_parts_of_their_own_do_not_differ(duplicates):
    assert duplicates.any and duplicates.differing(state()) == []


def test_every_flipped_bit_is_found_and_blamed_on_its_device(duplicates):
    draw, whole = random.Random(0), state()
    for _ in range(300):
        name = draw.choice(["whole", "cut", "half", "codes", "count"])
        device = draw.choice(jax.devices()[:8])
        size = whole[name].addressable_shards[0].data.nbytes
        found = duplicates.differing(whole | {name: flipped(whole[name], device, draw.randrange(8 * size))})
        assert [(one.path, one.devices) for one in found] == [(name, (device,))]
        assert len(found[0].others) == (7 if name in ("whole", "codes", "count") else 3)


def test_what_one_device_alone_holds_cannot_be_compared(duplicates):
    whole = state()
    assert duplicates.differing(whole | {"apart": flipped(whole["apart"], jax.devices()[3], 5)}) == []


def test_two_that_differ_are_both_named():
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",))
    whole = {"a": jax.device_put(jnp.arange(4.0), NamedSharding(mesh, PartitionSpec()))}
    two = ReplicaCheck(jax.eval_shape(lambda: whole), {"a": whole["a"].sharding}, mesh)
    (found,) = two.find_mismatches({"a": flipped(whole["a"], jax.devices()[1], 3)})
    assert str(found) == "a differs between devices 0, 1 (process 0)"


def test_elements_that_change_places_are_seen(duplicates):
    whole = state()
    copies = [np.array(shard.data) for shard in whole["whole"].addressable_shards]
    copies[5][[0, 1]] = copies[5][[1, 0]]
    parts = [jax.device_put(copy, shard.device) for copy, shard in
             zip(copies, whole["whole"].addressable_shards, strict=True)]  # fmt: skip
    array = jax.make_array_from_single_device_arrays((6, 5), whole["whole"].sharding, parts)
    (found,) = duplicates.differing(whole | {"whole": array})
    assert found.devices == (jax.devices()[5],)
