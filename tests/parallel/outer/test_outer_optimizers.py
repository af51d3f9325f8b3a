"""Outer optimizers against their equations in NumPy, and a battery over all of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.equivalence import tiny

from meshwright.configs.sections.outer import RULES, OuterConfig, largest_consensus
from meshwright.parallel.outer.exchange import make_exchange
from meshwright.parallel.outer.interface import OuterState
from meshwright.parallel.outer.matchings import matchings
from meshwright.parallel.outer.noloco import noloco
from meshwright.parallel.outer.registry import OUTER_OPTIMIZERS, build_outer_optimizer

REPLICAS = 4
MODEL = tiny(model={"layers": 3, "embed": 8}).model
SHAPES = {
    "embed": {"embedding": (6, 4)},
    "segments": {"0": {"0": {"block": {"mlp": {"up": {"kernel": (3, 4, 2)}}}}}},
}


def random_params(random, leading=()):
    """A small parameter tree of a model of three layers."""
    return jax.tree.map(
        lambda shape: jnp.asarray(random.normal(size=(*leading, *shape)), jnp.float32),
        SHAPES,
        is_leaf=lambda leaf: isinstance(leaf, tuple),
    )


def initial_replicas(outer, params):
    """(parameters [replica, ...], outer state) of replicas that all start at `params`."""
    state = outer.init(params)
    copies = lambda tree: jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (REPLICAS, *leaf.shape)), tree)
    return copies(params), copies(state) if outer.per_replica else state


def run(section, *, rounds=3, seed=0, every=4):
    """Random inner updates, and the outer steps that are due; yields (update, row, before, after, state, outer)."""
    section = OuterConfig(every=every, **section)
    exchange_factory = lambda wire: make_exchange(wire, replicas=REPLICAS)
    outer = build_outer_optimizer(section, model=MODEL, exchange_factory=exchange_factory, replicas=REPLICAS)
    random = np.random.default_rng(seed)
    params, state = initial_replicas(outer, random_params(random))
    compiled_steps = {outer_step.name: jax.jit(outer_step.run) for outer_step in outer.outer_steps}
    for update in range(1, rounds * every + 1):
        params = jax.tree.map(lambda leaf, step: leaf + 0.1 * step, params, random_params(random, (REPLICAS,)))
        row, before = update % 3, params
        for outer_step in outer.outer_steps:
            if outer_step.is_due(update):
                params, state = compiled_steps[outer_step.name](params, state, jnp.int32(row))
        yield update, row, before, params, state, outer


def leaf(tree):
    return np.asarray(tree["embed"]["embedding"])


@pytest.mark.parametrize(
    ("section", "learning_rate", "momentum"),
    [
        ({"name": "diloco", "learning_rate": 1.0, "momentum": 0.0}, 1.0, 0.0),
        ({"name": "diloco"}, 0.7, 0.9),
        ({"name": "local-sgd"}, 1.0, 0.0),
        ({"name": "streaming", "fragments": 1, "overlap": 0, "mix": 0.0}, 0.4, 0.9),
    ],
)
def test_one_fragment_takes_nesterov_steps_along_the_mean_outer_gradient(section, learning_rate, momentum):
    anchor = leaf(random_params(np.random.default_rng(0)))
    velocity = np.zeros_like(anchor)
    for update, _, before, after, state, outer in run(section):
        if update % 4:
            np.testing.assert_array_equal(leaf(after), leaf(before))
            continue
        gradient = anchor - leaf(before).mean(axis=0)
        velocity = momentum * velocity + gradient
        anchor = anchor - learning_rate * (gradient + momentum * velocity)
        np.testing.assert_allclose(leaf(after), np.broadcast_to(anchor, (REPLICAS, 6, 4)), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(leaf(outer.eval_params(after, state)), anchor, rtol=1e-5, atol=1e-6)


def test_streaming_fragments_take_outer_steps_in_turn_and_are_mixed_in_later():
    """Layer 1 is the last of three fragments here: sent after updates 6, 10, ..., received two later, half mixed."""
    kernel = lambda tree, leading: np.asarray(jax.tree.leaves(tree["segments"])[0]).take(1, axis=leading)
    section = {"name": "streaming", "fragments": 3, "overlap": 2, "mix": 0.25, "learning_rate": 0.5, "momentum": 0.8}
    anchor = kernel(random_params(np.random.default_rng(0)), 0)
    velocity, sent = np.zeros_like(anchor), []
    for update, _, before, after, state, _ in run(section, rounds=5):
        expected = kernel(before, 1)
        if update in (6, 10, 14, 18):
            gradient = anchor - expected.mean(axis=0)
            velocity = 0.8 * velocity + gradient
            anchor = anchor - 0.5 * (gradient + 0.8 * velocity)
            sent.append(update)
        if update in (8, 12, 16, 20):
            expected = 0.25 * expected + 0.75 * anchor
        np.testing.assert_allclose(kernel(after, 1), expected, rtol=1e-5, atol=1e-6, err_msg=f"update {update}")
        np.testing.assert_allclose(kernel(state.anchor, 0), anchor, rtol=1e-5, atol=1e-6)
    assert len(sent) == 4


def test_noloco_pairs_follow_the_corrected_equation():
    anchor = np.broadcast_to(leaf(random_params(np.random.default_rng(0))), (REPLICAS, 6, 4))
    velocity = np.zeros_like(anchor)
    for update, row, before, after, state, outer in run({"name": "noloco", "momentum": 0.5, "consensus": 0.6}):
        if update % 4 == 0:
            partner = matchings(REPLICAS)[row]
            change = leaf(before) - anchor
            velocity = 0.5 * velocity + 0.7 * (change + change[partner]) / 2 + 0.6 * (anchor[partner] - anchor) / 2
            anchor = anchor + velocity
            np.testing.assert_allclose(leaf(after), anchor, rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(leaf(outer.eval_params(after, state)), anchor.mean(axis=0), rtol=1e-5, atol=1e-6)


def test_eager_applies_its_own_outer_gradient_at_once_and_the_others_a_round_late():
    anchor = np.broadcast_to(leaf(random_params(np.random.default_rng(0))), (REPLICAS, 6, 4))
    velocity, last = np.zeros_like(anchor), np.zeros_like(anchor)
    for update, _, before, after, _, _ in run({"name": "eager"}, rounds=4):
        if update % 4 == 0:
            own = anchor - leaf(before)
            others = np.stack([np.delete(last, replica, axis=0).sum(axis=0) for replica in range(REPLICAS)])
            gradient, last = (own + others) / REPLICAS, own
            velocity = 0.9 * velocity + gradient
            anchor = anchor - 0.7 * (gradient + 0.9 * velocity)
            np.testing.assert_allclose(leaf(after), anchor, rtol=1e-5, atol=1e-5)


def test_peer_average_moves_partners_toward_each_other():
    for update, row, before, after, _, _ in run({"name": "peer-average", "rate": 0.25}, rounds=2):
        own, there = leaf(before), leaf(before)[matchings(REPLICAS)[row]]
        np.testing.assert_allclose(leaf(after), own if update % 4 else 0.75 * own + 0.25 * there, rtol=1e-6)


@pytest.mark.parametrize("name", OUTER_OPTIMIZERS)
def test_every_outer_optimizer_has_defaults_changes_parameters_and_keeps_shapes(name):
    assert OUTER_OPTIMIZERS.keys() == RULES.keys()
    *_, (_, _, before, after, state, outer) = run(
        {"name": name, "fragments": 3} if name == "streaming" else {"name": name}
    )
    assert jax.tree.map(jnp.shape, before) == jax.tree.map(jnp.shape, after)
    evaluated = outer.eval_params(after, state)
    assert jax.tree.map(jnp.shape, evaluated) == jax.tree.map(lambda leaf: leaf.shape[1:], after)
    assert not np.array_equal(leaf(evaluated), leaf(random_params(np.random.default_rng(0))))


@pytest.mark.parametrize(("replicas", "momentum"), [(2, 0.5), (4, 0.5), (8, 0.5), (5, 0.5), (8, 0.0), (4, 0.9)])
def test_noloco_variance_settles_below_the_largest_consensus_and_grows_above_it(replicas, momentum):
    """Exact: second moments of anchors and velocities are mapped by the mean of kron(A, A) over the matchings.

    A is the optimizer's linear map of (anchors, velocities) in an outer step without inner updates, around their mean.
    """
    swap = make_exchange(("float32", "float32"), replicas=replicas)

    def radius(consensus):
        optimizer = noloco(swap, interval=1, learning_rate=0.7, momentum=momentum, consensus=consensus)

        @jax.jit
        def outer_step(anchor, velocity, row):
            _, state = optimizer.outer_steps[0].run({"x": anchor}, OuterState({"x": anchor}, {"x": velocity}), row)
            return [leaf["x"] - leaf["x"].mean(axis=0) for leaf in (state.anchor, state.velocity)]

        units = jnp.eye(2 * replicas).reshape(2, replicas, 2 * replicas)  # a column each
        maps = [np.concatenate(outer_step(*units, row), dtype=np.float64) for row in range(len(matchings(replicas)))]
        return np.abs(np.linalg.eigvals(np.mean([np.kron(matrix, matrix) for matrix in maps], axis=0))).max()

    bound = largest_consensus(momentum, replicas=replicas)
    assert [radius(share * bound) < 1 for share in (0.01, 0.5, 0.99, 1.01, 1.5)] == [True, True, True, False, False]
