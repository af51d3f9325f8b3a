"""Routing: a microbatch continues in other replicas, and its gradient returns the same way, in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.toy_stages import FUNCTIONS, block, embed, layer_order, loss_head, problem

from meshwright.configs.sections.parallel import MeshConfig
from meshwright.parallel.mesh import make_mesh
from meshwright.parallel.pipeline.executor.replica_routing import draw_shifts, source_shifts
from meshwright.parallel.pipeline.executor.table_executor import pipeline_engine
from meshwright.parallel.pipeline.tables.lowering import lower_table
from meshwright.parallel.pipeline.tables.schedules.registry import make_table

REPLICAS, PIPE, MICROBATCHES = 4, 2, 4


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


def replicate(tree, *, equal):
    """Every array for each replica: the same, or a permutation for each."""
    random = np.random.default_rng(1)
    replica_of = lambda leaf: leaf if equal else random.permutation(leaf.reshape(-1)).reshape(leaf.shape)
    return jax.tree.map(
        lambda leaf: jnp.stack([jnp.asarray(replica_of(np.asarray(leaf))) for _ in range(REPLICAS)]), tree
    )


def shifts_of(table):
    return draw_shifts(jax.random.key(3), microbatches=MICROBATCHES, stages=table.stages, replicas=REPLICAS)


def at_index(tree, index):
    """The tree of every array's element at `index`."""
    return jax.tree.map(lambda leaf: leaf[index], tree)


def routed_sums(weights, frozen, batch, *, path):
    """Loss and weight of each replica's last stage, not by the executor: stage s of rows r in replica path(r, m, s)."""
    sums = [[0.0, 0.0] for _ in range(REPLICAS)]
    layers = frozen.stacked["scale"].shape[0]
    for source in range(REPLICAS):
        for microbatch in range(MICROBATCHES):
            fields = {name: leaf[source, microbatch::MICROBATCHES] for name, leaf in batch.items()}
            context = FUNCTIONS.context({}, fields, None)
            x = embed(at_index(weights.unstacked, source), {}, fields, context, None)
            for stage in range(layers):
                replica = path(source, microbatch, stage)
                layer = at_index(at_index(weights.stacked, replica), stage)
                x = block(layer, {"scale": frozen.stacked["scale"][stage]}, (context, stage), x)
            numerator, (weight, _) = loss_head(at_index(weights.unstacked, replica), {}, x, fields, context)
            sums[replica][0] += numerator
            sums[replica][1] += weight
    return jnp.stack([jnp.stack(pair) for pair in sums])


def expected(weights, frozen, batch, *, path):
    """Sums of each replica, and the gradient of them all by every replica's weights."""

    def total(weights):
        sums = routed_sums(weights, frozen, batch, path=path)
        return sums[:, 0].sum(), sums

    gradient, sums = jax.grad(total, has_aux=True)(weights)
    return sums[:, 0], sums[:, 1], gradient


def run_engine(table, weights, frozen, batch, shifts, *, replica=REPLICAS):
    """The executor's results under `vmap`, one layer a stage; `replica` is the size of the mesh axis."""
    mesh = make_mesh(MeshConfig(platform="cpu", replica=replica, pipe=PIPE))
    lowered = lower_table(table, repeats=(1,) * table.stages)
    engine = pipeline_engine(FUNCTIONS, lowered, repeats=1, mesh=mesh, zero=1, dtype=jnp.float64)
    order = layer_order(table, (1,) * table.stages)
    run_weights = weights._replace(stacked=jax.tree.map(lambda leaf: leaf[:, order], weights.stacked))
    run_frozen = frozen._replace(stacked=jax.tree.map(lambda leaf: leaf[order], frozen.stacked))
    vmapped = jax.vmap(engine, in_axes=(0, None, 0, None, None, None))
    with jax.set_mesh(mesh):
        loss, weight, gradient, _ = jax.device_get(
            jax.jit(vmapped)(run_weights, run_frozen, batch, None, lowered.fields, shifts)
        )
    inverse = np.argsort(order)
    return loss, weight, gradient._replace(stacked=jax.tree.map(lambda leaf: leaf[:, inverse], gradient.stacked))


def make_inputs(table, *, equal):
    weights, frozen, batch = problem(layers=table.stages, tied=False)
    return replicate(weights, equal=equal), frozen, replicate(batch, equal=False)


def assert_equal(results, expected):
    pairs = zip(jax.tree_util.tree_leaves_with_path(expected), jax.tree.leaves(results), strict=True)
    for (path, exact), leaf in pairs:
        np.testing.assert_allclose(leaf, exact, rtol=1e-10, atol=1e-10, err_msg=str(path))


@pytest.mark.parametrize(("schedule", "replica"), [("1f1b", REPLICAS), ("zb-v", REPLICAS), ("zb-v", 1)])
def test_activations_and_gradients_take_the_routed_path(schedule, replica):
    table = make_table(schedule, devices=PIPE, microbatches=MICROBATCHES)
    weights, frozen, batch = make_inputs(table, equal=False)
    shifts = shifts_of(table)
    assert len(np.unique(shifts)) > 1
    sources = np.asarray(source_shifts(shifts))
    path = lambda source, microbatch, stage: source ^ int(sources[microbatch, stage])
    results = run_engine(table, weights, frozen, batch, shifts, replica=replica)
    assert_equal(results, jax.jit(functools.partial(expected, path=path))(weights, frozen, batch))


def test_with_equal_replicas_the_sum_over_them_equals_the_sum_without_routing():
    table = make_table("1f1b", devices=PIPE, microbatches=MICROBATCHES)
    weights, frozen, batch = make_inputs(table, equal=True)
    straight, routed = (run_engine(table, weights, frozen, batch, shifts) for shifts in (None, shifts_of(table)))
    sum_replicas = lambda sums: jax.tree.map(lambda leaf: leaf.sum(0), sums)
    assert_equal(sum_replicas(routed), sum_replicas(straight))
    assert not np.allclose(routed[0], straight[0])  # a replica's last stage gets other rows


def test_every_replica_is_equally_likely_after_every_stage():
    shifts = np.asarray(draw_shifts(jax.random.key(0), microbatches=4000, stages=3, replicas=4))
    assert not shifts[:, 2].any()
    for boundary in range(2):
        np.testing.assert_allclose(np.bincount(shifts[:, boundary], minlength=4) / 4000, 1 / 4, atol=0.03)
    assert abs(np.corrcoef(shifts[:, 0], shifts[:, 1])[0, 1]) < 0.05
