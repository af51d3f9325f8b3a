"""Snapshots in memory are exact, load on any mesh, are kept in two slots, and are never restored damaged."""

import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from meshwright.checkpoint.manifest import DamagedCheckpoint
from meshwright.checkpoint.memory_store import MemoryStore
from meshwright.checkpoint.redundancy.shm_slots import read_header
from meshwright.checkpoint.storage import flatten_paths, saved_tree
from meshwright.parallel.state import TrainState


def state(seed, *spec):
    """A state sharded over eight devices, with what `spec` says of its matrix."""
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("x", "y"))
    random_source = np.random.default_rng(seed)
    params = {
        "a": random_source.normal(size=(16, 8)).astype(np.float32),
        "b": random_source.normal(size=(5,)).astype(jnp.bfloat16),
    }
    whole = TrainState(np.int32(seed), params, {}, (), (), np.zeros(2, np.uint32))
    repeated = NamedSharding(mesh, PartitionSpec())
    shardings = jax.tree.map(lambda leaf: repeated, whole)
    shardings.params["a"] = NamedSharding(mesh, PartitionSpec(*spec))
    return jax.device_put(whole, shardings), shardings


def shapes(saved):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), saved)


def restored(memory, step, saved, shardings):
    return memory.restore(step, shapes=shapes(saved), shardings=shardings)


def usable_steps(memory, saved, shardings):
    return memory.usable_steps(flatten_paths(saved_tree(shardings)), flatten_paths(saved_tree(shapes(saved))))


def files(memory):
    return sorted(memory.directory.glob("*.[01]"))


def same(actual, expected):
    return all(jax.tree.leaves(jax.tree.map(np.array_equal, actual, expected)))


@pytest.fixture
def memory(tmp_path):
    return MemoryStore(tmp_path / "slots")


@pytest.mark.parametrize("spec", [("x", "y"), (None, "x"), (), (("x", "y"),)], ids=str)
def test_a_snapshot_is_restored_on_any_mesh(memory, spec):
    saved, _ = state(1, "x", "y")
    memory.save(saved, step=1, data={"samples": 8})
    _, shardings = state(1, *spec)
    found, data = restored(MemoryStore(memory.directory), 1, saved, shardings)
    assert same(found, saved) and data == {"samples": 8} and found.params["a"].sharding == shardings.params["a"]


def test_two_slots_hold_the_two_newest_steps(memory):
    for step in (1, 2, 3):
        saved, shardings = state(step, "x")
        memory.save(saved, step=step, data={})
    assert usable_steps(memory, saved, shardings) == [2, 3]
    assert same(restored(memory, 2, saved, shardings)[0], state(2, "x")[0])


def test_donation_does_not_change_a_snapshot(memory):
    saved, shardings = state(1, "x")
    wanted = jax.tree.map(np.array, saved)
    memory.save(saved, step=1, data={})
    jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf + 1, tree), donate_argnums=0)(saved)
    assert saved.params["a"].is_deleted() and same(restored(memory, 1, wanted, shardings)[0], wanted)


def test_an_interrupted_write_leaves_no_snapshot(memory, monkeypatch):
    """The previous step is still complete."""
    first, shardings = state(1, "x")
    memory.save(first, step=1, data={})
    second, _ = state(2, "x")
    monkeypatch.setattr(np, "copyto", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        memory.save(second, step=2, data={})
    monkeypatch.undo()
    assert usable_steps(memory, first, shardings) == [1] and same(restored(memory, 1, first, shardings)[0], first)


def test_no_flipped_bit_is_restored(memory):
    saved, shardings = state(1, "x")
    memory.save(saved, step=1, data={"samples": 8})
    (file,) = files(memory)
    before, random_source, refused = file.read_bytes(), random.Random(0), 0
    payload = [range(offset, offset + size) for offset, size, _ in read_header(file)["blocks"]]
    for _ in range(300):
        place = random_source.randrange(8 * len(before))
        damaged = bytearray(before)
        damaged[place // 8] ^= 1 << place % 8
        file.write_bytes(damaged)
        again = MemoryStore(memory.directory)
        try:
            found, data = restored(again, 1, saved, shardings)
            assert same(found, saved) and data == {"samples": 8}, place
            assert not any(place // 8 in block for block in payload), "a bit of the payload"
        except DamagedCheckpoint:
            refused += 1
    assert refused > 150  # the rest fell between the blocks


def test_a_snapshot_of_another_model_is_not_usable(memory):
    saved, shardings = state(1, "x")
    memory.save(saved, step=1, data={})
    other = shapes(saved)
    other.params["a"] = jax.ShapeDtypeStruct((16, 16), np.float32)
    assert memory.usable_steps(flatten_paths(saved_tree(shardings)), flatten_paths(saved_tree(other))) == []
    memory.clear()
    assert not files(memory)
