"""Selective by element: which are found, and that nothing else moves."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support.equivalence import assert_same, tiny

from meshwright.configs.errors import UserError
from meshwright.configs.sections.adapter import AdapterConfig
from meshwright.parallel.mesh import make_mesh
from meshwright.train.engine.host_data import make_global_arrays
from meshwright.train.engine.program import build
from meshwright.train.optim.sparse_finetuning import count_true, masked_optimizer, top_k_mask

MESH = {"data": 2, "fsdp": 2, "tensor": 2}
RATE = 0.1


def tree(random):
    return {"one": random.normal(size=(4, 5)).astype(np.float32), "two": random.normal(size=30).astype(np.float32)}


def best(scores, count):
    limit = np.sort(np.concatenate([score.ravel() for score in scores.values()]))[-count]
    return {name: score >= limit for name, score in scores.items()}


def test_top_k_mask_selects_over_all_leaves():
    scores = {name: np.abs(leaf) for name, leaf in tree(np.random.default_rng(0)).items()}
    found = jax.jit(lambda scores: top_k_mask(scores, count=7))(scores)
    for name, wanted in best(scores, 7).items():
        np.testing.assert_array_equal(found[name], wanted)
    nothing = top_k_mask({"one": jnp.zeros(10)}, count=5)
    assert not nothing["one"].any()  # what never had a gradient is never chosen


def test_count_true_is_right_beyond_the_range_of_int32():
    """What is seen as [2**17, 2**15] has 2**32 elements, and 32 bits would call them none."""
    row = jnp.arange(2**15) >= 0
    assert float(jax.jit(lambda row: count_true({"wide": jnp.broadcast_to(row, (2**17, 2**15))}))(row)) == 2.0**32


@pytest.mark.parametrize("method", ["fishmask", "lottery"])
def test_the_update_is_that_of_the_paper(method):
    """Five updates in numpy, of which two look for the elements."""
    random = np.random.default_rng(1)
    adapter = AdapterConfig(method=method, density=0.2, scouting=2)
    chain = optax.named_chain(("sgd", optax.trace(decay=0.9)), ("learning_rate", optax.scale_by_learning_rate(RATE)))
    optimizer = masked_optimizer(chain, adapter)
    first = tree(random)
    ours, theirs, gradients = first, dict(first), [tree(random) for _ in range(5)]
    state, update = optimizer.init(first), jax.jit(optimizer.update)
    fisher = {name: sum(np.square(g[name]) for g in gradients[:2]) for name in first}
    momentum, kept = {name: 0 * leaf for name, leaf in first.items()}, None
    for step, gradient in enumerate(gradients, start=1):
        updates, state = update(gradient, state, ours)
        ours = optax.apply_updates(ours, updates)
        if step > 2 or method == "lottery":
            for name in first:
                momentum[name] = 0.9 * momentum[name] + gradient[name] * (1 if kept is None else kept[name])
                theirs[name] = theirs[name] - RATE * momentum[name]
        if step == 2:
            moved = {name: np.abs(theirs[name] - first[name]) for name in first}
            kept = best(fisher if method == "fishmask" else moved, 10)
            momentum, theirs = {name: 0 * leaf for name, leaf in first.items()}, dict(first)
        for name in first:
            np.testing.assert_allclose(ours[name], theirs[name], atol=1e-6)
    assert sum((np.asarray(ours[name]) != first[name]).sum() for name in first) == 10


@pytest.mark.parametrize("method", ["fishmask", "lottery"])
def test_a_run_changes_only_as_many_elements_as_the_density_says(method):
    """Of the MLPs, of one layer of two that share a stack."""
    from support.equivalence import batches

    adapter = {"method": method, "density": 0.05, "scouting": 2, "targets": ["layers/1/mlp/*"]}
    config = tiny(adapter=adapter, mesh={"pipe": 1})
    program = build(config, make_mesh(config.mesh))
    state, step = program.initialize(), program.compiled_step()
    start = jax.device_get(state.params)
    for batch in batches(config, 5):
        state, _ = step(state, make_global_arrays(batch, config, program.mesh))
    moved = jax.tree.map(lambda one, other: one != other, jax.device_get(state.params), start)
    total = sum(leaf.size for leaf in jax.tree.leaves(start))
    assert sum(leaf.sum() for leaf in jax.tree.leaves(moved)) == round(0.05 * total)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "mesh"), [("fishmask", MESH), ("fishmask", {"data": 2, "seq": 2, "tensor": 2}), ("lottery", MESH)]
)
def test_the_result_is_the_same_on_every_mesh(method, mesh):
    adapter = {"method": method, "density": 0.1, "scouting": 2}
    sgd = {"name": "sgd", "b1": 0.0}
    assert_same(tiny(adapter=adapter, optimizer=sgd), tiny(adapter=adapter, optimizer=sgd, mesh=mesh), steps=4)


def test_a_search_that_takes_the_whole_run_is_refused():
    with pytest.raises(UserError, match=r"adapter.scouting: 5 updates leave none of 5 steps"):
        tiny(adapter={"method": "lottery", "scouting": 5})
