"""The replica check: a flipped bit on one device is found, and that device is the suspect."""

import random

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from support.corruption import flip_bit

from meshwright.parallel.replica_check import ReplicaCheck

MESH = Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("data", "fsdp"))
SPECS = {
    "replicated": PartitionSpec(), "fsdp": PartitionSpec("fsdp"), "unique": PartitionSpec(("data", "fsdp")),
    "columns": PartitionSpec(None, "fsdp"), **dict.fromkeys(("codes", "count", "flags"), PartitionSpec()),
}  # fmt: skip


def state():
    draw = np.random.default_rng(0)
    values = {
        "replicated": draw.random((6, 5), np.float32),
        "fsdp": draw.random((8, 3), np.float32),
        "unique": draw.random(16, np.float32),
        "columns": draw.random((4, 6)).astype(ml_dtypes.bfloat16),
        "codes": draw.integers(-100, 100, 33, dtype=np.int8),
        "count": np.int32(7),
        "flags": np.array([True, False, True]),
    }
    return {name: jax.device_put(value, NamedSharding(MESH, SPECS[name])) for name, value in values.items()}


@pytest.fixture(scope="module")
def check():
    values = state()
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), values)
    return ReplicaCheck(shapes, jax.tree.map(lambda leaf: leaf.sharding, values), MESH)


def test_equal_replicas_have_no_mismatch(check):
    assert check.has_replicas and check.find_mismatches(state()) == []


def test_every_flipped_bit_is_found_and_its_device_is_the_suspect(check):
    draw, values = random.Random(0), state()
    for _ in range(300):
        name = draw.choice(["replicated", "fsdp", "columns", "codes", "count"])
        device = draw.choice(jax.devices()[:8])
        size = values[name].addressable_shards[0].data.nbytes
        mismatches = check.find_mismatches(values | {name: flip_bit(values[name], device, draw.randrange(8 * size))})
        assert [(mismatch.path, mismatch.suspects) for mismatch in mismatches] == [(name, (device,))]
        assert len(mismatches[0].majority) == (7 if name in ("replicated", "codes", "count") else 3)


def test_a_shard_on_a_single_device_cannot_be_compared(check):
    values = state()
    assert check.find_mismatches(values | {"unique": flip_bit(values["unique"], jax.devices()[3], 5)}) == []


def test_without_a_majority_all_devices_are_suspects():
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",))
    values = {"a": jax.device_put(jnp.arange(4.0), NamedSharding(mesh, PartitionSpec()))}
    check = ReplicaCheck(jax.eval_shape(lambda: values), {"a": values["a"].sharding}, mesh)
    (mismatch,) = check.find_mismatches({"a": flip_bit(values["a"], jax.devices()[1], 3)})
    assert str(mismatch) == "a differs between devices 0, 1 (process 0)"


def test_swapped_elements_are_found(check):
    values = state()
    copies = [np.array(shard.data) for shard in values["replicated"].addressable_shards]
    copies[5][[0, 1]] = copies[5][[1, 0]]
    parts = [jax.device_put(copy, shard.device) for copy, shard in
             zip(copies, values["replicated"].addressable_shards, strict=True)]  # fmt: skip
    array = jax.make_array_from_single_device_arrays((6, 5), values["replicated"].sharding, parts)
    (mismatch,) = check.find_mismatches(values | {"replicated": array})
    assert mismatch.suspects == (jax.devices()[5],)
