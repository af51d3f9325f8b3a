"""Routing: a microbatch goes on in other replicas, and its gradient comes back the same way, in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.toy_stages import PARTS, block, enter, leave, order, problem

from meshwright.configs.sections.parallel import MeshConfig
from meshwright.parallel.mesh import make_mesh
from meshwright.parallel.pipeline.executor.replica_routing import drawn, origins
from meshwright.parallel.pipeline.executor.table_executor import pipelined
from meshwright.parallel.pipeline.tables.lowering import rows_of, wired
from meshwright.parallel.pipeline.tables.schedules.registry import make

REPLICAS, PIPE, MICROBATCHES = 4, 2, 4


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


def several(tree, *, alike):
    """One of everything for each replica: alike, or each with numbers of its own."""
    random = np.random.default_rng(1)
    own = lambda leaf: leaf if alike else random.permutation(leaf.reshape(-1)).reshape(leaf.shape)
    return jax.tree.map(lambda leaf: jnp.stack([jnp.asarray(own(np.asarray(leaf))) for _ in range(REPLICAS)]), tree)


def shifts_of(table):
    return drawn(jax.random.key(3), microbatches=MICROBATCHES, stages=table.stages, replicas=REPLICAS)


def of(tree, number):
    """What a tree's arrays hold at a number."""
    return jax.tree.map(lambda leaf: leaf[number], tree)


def followed(weights, frozen, batch, *, path):
    """Loss and weight of each replica's last stage, by hand: rows of replica r, each stage in replica path(r, m, s)."""
    sums = [[0.0, 0.0] for _ in range(REPLICAS)]
    layers = frozen.stacked["scale"].shape[0]
    for home in range(REPLICAS):
        for microbatch in range(MICROBATCHES):
            fields = {name: leaf[home, microbatch::MICROBATCHES] for name, leaf in batch.items()}
            context = PARTS.context({}, fields, None)
            x = enter(of(weights.ends, home), {}, fields, context, None)
            for stage in range(layers):
                replica = path(home, microbatch, stage)
                own = of(of(weights.stacked, replica), stage)
                x = block(own, {"scale": frozen.stacked["scale"][stage]}, (context, stage), x)
            numerator, (weight, _) = leave(of(weights.ends, replica), {}, x, fields, context)
            sums[replica][0] += numerator
            sums[replica][1] += weight
    return jnp.stack([jnp.stack(one) for one in sums])


def expected(weights, frozen, batch, *, path):
    """Sums of each replica, and the gradient of them all by every replica's weights."""

    def total(weights):
        sums = followed(weights, frozen, batch, path=path)
        return sums[:, 0].sum(), sums

    gradient, sums = jax.grad(total, has_aux=True)(weights)
    return sums[:, 0], sums[:, 1], gradient


def found(table, weights, frozen, batch, shifts, *, replica=REPLICAS):
    """What the engine makes of it under `vmap`, one layer a stage; `replica` is the size of the mesh axis."""
    mesh = make_mesh(MeshConfig(platform="cpu", replica=replica, pipe=PIPE))
    wiring = wired(table, repeats=(1,) * table.stages)
    engine = pipelined(PARTS, wiring, repeats=1, mesh=mesh, zero=1, dtype=jnp.float64)
    places = order(table, (1,) * table.stages)
    own = weights._replace(stacked=jax.tree.map(lambda leaf: leaf[:, places], weights.stacked))
    fixed = frozen._replace(stacked=jax.tree.map(lambda leaf: leaf[places], frozen.stacked))
    lifted = jax.vmap(engine, in_axes=(0, None, 0, None, None, None))
    with jax.set_mesh(mesh):
        loss, weight, gradient, _ = jax.device_get(jax.jit(lifted)(own, fixed, batch, None, rows_of(wiring), shifts))
    back = np.argsort(places)
    return loss, weight, gradient._replace(stacked=jax.tree.map(lambda leaf: leaf[:, back], gradient.stacked))


def given(table, *, alike):
    weights, frozen, batch = problem(layers=table.stages, tied=False)
    return several(weights, alike=alike), frozen, several(batch, alike=False)


def assert_equal(one, other):
    for (path, wanted), leaf in zip(jax.tree_util.tree_leaves_with_path(other), jax.tree.leaves(one), strict=True):
        np.testing.assert_allclose(leaf, wanted, rtol=1e-10, atol=1e-10, err_msg=str(path))


@pytest.mark.parametrize(("schedule", "replica"), [("1f1b", REPLICAS), ("zb-v", REPLICAS), ("zb-v", 1)])
def test_the_routed_path_is_followed_there_and_back(schedule, replica):
    table = make(schedule, devices=PIPE, microbatches=MICROBATCHES)
    weights, frozen, batch = given(table, alike=False)
    shifts = shifts_of(table)
    assert len(np.unique(shifts)) > 1
    ways = np.asarray(origins(shifts))
    path = lambda home, microbatch, stage: home ^ int(ways[microbatch, stage])
    made = found(table, weights, frozen, batch, shifts, replica=replica)
    assert_equal(made, jax.jit(functools.partial(expected, path=path))(weights, frozen, batch))


def test_with_equal_replicas_the_sum_over_them_is_that_without_routing():
    table = make("1f1b", devices=PIPE, microbatches=MICROBATCHES)
    weights, frozen, batch = given(table, alike=True)
    straight, routed = (found(table, weights, frozen, batch, shifts) for shifts in (None, shifts_of(table)))
    together = lambda sums: jax.tree.map(lambda leaf: leaf.sum(0), sums)
    assert_equal(together(routed), together(straight))
    assert not np.allclose(routed[0], straight[0])  # other rows end in a replica


def test_every_replica_is_as_likely_behind_every_boundary():
    shifts = np.asarray(drawn(jax.random.key(0), microbatches=4000, stages=3, replicas=4))
    assert not shifts[:, 2].any()
    for boundary in range(2):
        np.testing.assert_allclose(np.bincount(shifts[:, boundary], minlength=4) / 4000, 1 / 4, atol=0.03)
    assert abs(np.corrcoef(shifts[:, 0], shifts[:, 1])[0, 1]) < 0.05
