"""AdaLoRA's budget against the paper's equations in numpy."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support.equivalence import tiny

from meshwright.configs.errors import UserError
from meshwright.configs.sections.adapter import AdapterConfig
from meshwright.models.adapters.adapted_modules import find_adapted_modules
from meshwright.models.adapters.attach import flatten
from meshwright.parallel.layout import reorder_layers
from meshwright.parallel.mesh import make_mesh
from meshwright.train.engine.program import build
from meshwright.train.optim.adalora_schedule import orthogonality_penalty, rank_allocator

STEPS, RATE = 12, 0.05
ADAPTER = AdapterConfig(method="adalora", rank=4, budget={"rank": 2, "after": 2, "every": 3, "settled": 2})
MODULES = 3  # two layers of one map, one of another
EVERY = {"q/adapter/e": np.ones(2, bool), "o/adapter/e": np.ones(1, bool)}


def leaves(random):
    def layers(count, inputs, outputs):
        return {
            "a": random.normal(size=(count, inputs, 4)),
            "b": random.normal(size=(count, 4, outputs)),
            "e": random.normal(size=(count, 4)),
        }

    return {"q": {"adapter": layers(2, 6, 5)}, "o": {"adapter": layers(1, 5, 6)}}


def gram_gradient(x):
    """Gradient of |x^T x - 1| by x [n, 4]."""
    gap = x.T @ x - np.eye(4)
    return 2 * x @ gap / np.linalg.norm(gap)


def add_penalty_gradient(params, gradient):
    """The gradient plus that of the orthogonality penalty."""
    total = {name: leaf.copy() for name, leaf in gradient.items()}
    for layer in range(len(params["e"])):
        total["a"][layer] += 0.5 * gram_gradient(params["a"][layer]) / (2 * MODULES)
        total["b"][layer] += 0.5 * gram_gradient(params["b"][layer].T).T / (2 * MODULES)
    return total


def test_the_budget_goes_to_the_most_important_triplets():
    """Every step of a run in numpy: the same weights, and the same entries taken away."""
    random = np.random.default_rng(0)
    params = leaves(random)
    optimizer = rank_allocator(optax.named_chain(("sgd", optax.sgd(RATE))), ADAPTER, present=EVERY, steps=STEPS)
    ours = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)
    state, update = optimizer.init(ours), jax.jit(optimizer.update)
    importance, uncertainty = (jax.tree.map(np.zeros_like, params) for _ in range(2))
    counts, kept = [], None
    for step in range(1, STEPS + 1):
        gradient = leaves(random)
        updates, state = update(jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), gradient), state, ours)
        ours = optax.apply_updates(ours, updates)

        total, scores = {}, {}
        for name in params:
            own, g = params[name]["adapter"], add_penalty_gradient(params[name]["adapter"], gradient[name]["adapter"])
            for leaf in own:
                now, mean, apart = (
                    np.abs(own[leaf] * g[leaf]),
                    importance[name]["adapter"],
                    uncertainty[name]["adapter"],
                )
                mean[leaf] = 0.85 * mean[leaf] + 0.15 * now
                apart[leaf] = 0.85 * apart[leaf] + 0.15 * np.abs(now - mean[leaf])
                total[leaf] = mean[leaf] * apart[leaf]
                own[leaf] -= RATE * g[leaf]
            scores[name] = total["e"] + total["a"].mean(axis=1) + total["b"].mean(axis=2)
        if step in (3, 6, 9, 10):
            done = np.clip((step - 2) / 8, 0, 1)
            left = int(np.round(MODULES * (2 + 2 * (1 - done) ** 3)))
            limit = np.sort(np.concatenate([score.ravel() for score in scores.values()]))[-left]
            kept = {name: score >= limit for name, score in scores.items()}
        if step in (3, 6, 9, 10, 11, 12):
            for name, flags in kept.items():
                params[name]["adapter"]["e"] *= flags
        counts.append(sum(int(np.count_nonzero(part["adapter"]["e"])) for part in ours.values()))
        for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(params), strict=True):
            np.testing.assert_allclose(one, other, atol=1e-4)
    assert counts == [12, 12, 10, 12, 12, 7, 12, 12, 6, 6, 6, 6]


def test_a_layer_without_an_adapter_gets_no_rank():
    """What is in its place decides nothing, and the budget is that of the others."""
    random = np.random.default_rng(2)
    steps = [leaves(random) for _ in range(STEPS + 1)]
    present = EVERY | {"q/adapter/e": np.array([True, False, True])}

    def wider(tree):
        return tree | {"q": jax.tree.map(lambda leaf: np.insert(leaf, 1, 9 * leaf[0] + 1, axis=0), tree["q"])}

    def entries(params, gradients, present):
        optimizer = rank_allocator(optax.named_chain(("sgd", optax.sgd(RATE))), ADAPTER, present=present, steps=STEPS)
        params, *gradients = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), [params, *gradients])
        state, update = optimizer.init(params), jax.jit(optimizer.update)
        for gradient in gradients:
            updates, state = update(gradient, state, params)
            params = optax.apply_updates(params, updates)
        return {name: np.asarray(own["adapter"]["e"]) for name, own in params.items()}

    assert float(orthogonality_penalty(wider(steps[0]), present=present)) == pytest.approx(
        float(orthogonality_penalty(steps[0], present=EVERY))
    )
    alone = entries(steps[0], steps[1:], EVERY)
    among = entries(wider(steps[0]), [wider(gradient) for gradient in steps[1:]], present)
    assert np.count_nonzero(alone["q"]) + np.count_nonzero(alone["o"]) == MODULES * 2
    assert not among["q"][1].any()
    np.testing.assert_allclose(among["q"][[0, 2]], alone["q"], atol=1e-6)
    np.testing.assert_allclose(among["o"], alone["o"], atol=1e-6)


def test_the_penalty_is_zero_for_orthogonal_factors():
    random = np.random.default_rng(1)
    q, _ = np.linalg.qr(random.normal(size=(6, 4)))
    own = {"q": {"adapter": {"a": jnp.asarray(q[None]), "b": jnp.asarray(q.T[None]), "e": jnp.ones((1, 4))}}}
    present = {"q/adapter/e": np.ones(1, bool)}
    assert float(orthogonality_penalty(own, present=present)) < 1e-5
    own["q"]["adapter"]["a"] *= 2
    assert float(orthogonality_penalty(own, present=present)) == pytest.approx(
        3 * 2 / 2, rel=1e-4
    )  # |4 - 1| of four, a mean of two


V = {"mesh": {"pipe": 2}, "microbatches": 4, "model": {"layers": 5}, "pipeline": {"schedule": "v-half"}}
ADAPTED = {
    "every map": ({}, 2 * 7),
    "some of a stack": ({"targets": ["layers/0/attn/q", "layers/1/mlp/*"]}, 4),
    "in a pipeline's order": ({"targets": ["layers/[13]/attn/q"]} | V, 2),
}


@pytest.mark.parametrize(("settings", "maps"), ADAPTED.values(), ids=ADAPTED)
def test_a_run_ends_with_its_budget(settings, maps):
    changes = dict(settings)
    targets = {"targets": changes.pop("targets")} if "targets" in changes else {}
    adapter = {"method": "adalora", "rank": 4, "budget": {"rank": 1, "settled": 1}} | targets
    config = tiny(adapter=adapter, optimizer={"warmup_steps": 0}, steps=3, **changes)
    program = build(config, make_mesh(config.mesh))
    update = jax.jit(lambda g, state, params: program.optimizer.update(g, state, params))
    params = jax.jit(lambda: program.initial().params)()
    state = program.optimizer.init(params)
    for step in range(3):
        draw = partial(jax.random.normal, jax.random.key(step))
        gradient = jax.tree.map(lambda leaf, draw=draw: draw(leaf.shape), params)
        updates, state = update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    tree, scales = reorder_layers({"params": params}, before=program.order, after=None)["params"], {}
    for site in find_adapted_modules(config.model, config.adapter):
        scales[f"{site.path}/adapter/e"] = np.array(site.scales)
    left = {path: np.count_nonzero(leaf, axis=1) for path, leaf in flatten(tree).items() if path in scales}
    assert left.keys() == scales.keys() and sum(map(np.sum, left.values())) == maps
    assert not any(found[scales[path] == 0].any() for path, found in left.items())


MISTAKES = {
    "more than at first": ({"rank": 4, "budget": {"rank": 5}}, r"adapter.budget.rank: 5 exceeds adapter.rank \(4\)"),
    "no time": ({"budget": {"after": 3, "settled": 2}}, "adapter.budget: after 3 and settled 2 leave none of 5 steps"),
}


@pytest.mark.parametrize(("settings", "error"), MISTAKES.values(), ids=MISTAKES)
def test_a_budget_that_cannot_be_kept_is_refused(settings, error):
    with pytest.raises(UserError, match=error):
        tiny(adapter={"method": "adalora"} | settings)


@pytest.mark.parametrize("method", ["adalora", "fishmask", "lottery"])
def test_methods_that_choose_by_importance_are_refused_with_replicas(method):
    adapter = {"method": method} | ({"budget": {"settled": 1}} if method == "adalora" else {"scouting": 1})
    with pytest.raises(UserError, match=f"adapter.method: {method} "):
        tiny(adapter=adapter, mesh={"replica": 2}, outer={"name": "diloco", "every": 2})
