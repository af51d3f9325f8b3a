"""Fingerprints are the same for every sharding and change with every change; blocks tile the array."""

import jax
import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from meshwright.checkpoint import fingerprints as fp
from meshwright.checkpoint.fingerprints import blocks, fingerprints

SHAPES = st.lists(st.integers(1, 70), max_size=4).map(tuple)


@settings(max_examples=60, deadline=None)
@given(shape=SHAPES)
def test_blocks_tile_the_array(shape):
    counts = np.zeros(shape, int)
    for box in blocks(shape):
        counts[tuple(slice(*edge) for edge in box)] += 1
    assert (counts == 1).all() and len(blocks(shape)) <= 128


def test_a_fingerprint_is_the_xxh3_of_the_bytes_of_a_block():
    array = np.random.default_rng(0).normal(size=(3, 64, 16)).astype(np.float32)
    found = fingerprints(array, [(1, slice(None, 61))])[0]
    inner = array[1, :61]
    parts = [np.ascontiguousarray(inner[a:b, c:d]).tobytes() for (a, b), (c, d) in blocks((61, 16))]
    assert len(parts) == 4 and found == [xxhash.xxh3_64_hexdigest(part) for part in parts]


@pytest.mark.parametrize("spec", [("x",), (None, "x"), ("x", "y"), (("x", "y"),), (None, ("y", "x"))])
def test_fingerprints_do_not_depend_on_the_sharding(spec):
    array = np.random.default_rng(0).normal(size=(64, 24)).astype(np.float32)
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("x", "y"))
    sharded = jax.device_put(array, NamedSharding(mesh, PartitionSpec(*spec)))
    indices = [(slice(None, 61),), (7,), ()]
    assert fingerprints(sharded, indices) == fingerprints(array, indices)


CHANGES = {
    "one bit": lambda a: a.view(np.uint8).reshape(-1).__setitem__(5, a.view(np.uint8).reshape(-1)[5] ^ 1),
    "two equal elements swapped with others": lambda a: a.__setitem__((0, [0, 1]), a[0, [1, 0]]),
    "two blocks swapped": lambda a: a.__setitem__(slice(None), np.concatenate([a[32:], a[:32]])),
    "a negative zero": lambda a: a.__setitem__((3, 3), -0.0),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_every_change_changes_the_fingerprints(change):
    array = np.random.default_rng(0).normal(size=(64, 24)).astype(np.float32)
    array[3, 3] = 0.0
    before = fingerprints(array, [()])
    change(array)
    assert fingerprints(array, [()]) != before


def test_hashing_does_not_prevent_donation():
    """A live view of a buffer would silently keep the step from reusing it."""
    mesh = Mesh(np.array(jax.devices()[:1]), ("x",))
    array = jax.device_put(np.ones((64, 64), np.float32), NamedSharding(mesh, PartitionSpec()))
    fingerprints(array, [()])
    jax.jit(lambda x: x + 1, donate_argnums=0)(array)
    assert array.is_deleted()


def test_a_block_across_processes_has_no_owner():
    """Two processes hold half the rows each: one holds a block of eight rows, neither holds all rows."""
    halves = {0: {((0, 32), (0, 8))}, 1: {((32, 64), (0, 8))}}
    boxes = [((0, 8), (0, 8)), ((56, 64), (0, 8)), ((0, 64), (0, 8))]
    assert [[fp.covers(parts, box) for parts in halves.values()] for box in boxes] == [
        [True, False], [False, True], [False, False]
    ]  # fmt: skip
