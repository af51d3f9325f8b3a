"""An outer step split into sending and receiving equals the one of the mesh, for every optimizer and wire format."""

import functools

import jax
import numpy as np
import pytest
from support.equivalence import tiny

from meshwright.configs.sections.outer import PAIRWISE_RULES, RULES
from meshwright.parallel.outer.exchange import make_exchange
from meshwright.parallel.outer.registry import build_outer_optimizer
from meshwright.parallel.outer.split_round import decode, find_defect, pack, split_outer_step, unpack
from meshwright.parallel.outer.wire_formats import WIRE_FORMATS

COUNT = 4
SIZES = {"layers": 2, "embed": 16, "vocab": 61, "heads": 2, "kv_heads": 2, "mlp": 24}


def random_params(seed):
    """A parameter tree of two layers, with a scalar in each."""
    draw = np.random.default_rng(seed).normal
    block = {"attn": {"q": {"kernel": draw(size=(2, 6, 10))}}, "scale": draw(size=(2,))}
    tree = {"embed": {"embedding": draw(size=(5, 6))}, "segments": {"0": {"0": {"block": block}}}}
    return jax.tree.map(lambda leaf: leaf.astype(np.float32), tree)


def stacked(trees):
    return jax.tree.map(lambda *each: np.stack(each), *trees)


def mean_of(trees):
    return jax.tree.map(lambda *leaves: sum(leaves) / len(leaves), *trees)


def row_of(tree, number):
    return jax.tree.map(lambda leaf: leaf[number], tree)


def assert_same(tree, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), tree, expected)


@pytest.mark.parametrize("name", RULES)
def test_sending_and_receiving_equal_the_outer_step_of_the_mesh(name):
    outer = {"name": name, "every": 4} | ({"fragments": 3} if name == "streaming" else {})
    config = tiny(model=SIZES, outer=outer, islands={"count": COUNT})
    build = functools.partial(build_outer_optimizer, config.outer, model=config.model, replicas=COUNT)
    make = lambda factory: build(exchange_factory=factory)
    optimizer = make(lambda wire: make_exchange(wire, replicas=COUNT))
    params, states = [random_params(seed) for seed in range(COUNT)], [optimizer.init(random_params(9))] * COUNT
    outer_step, row = optimizer.outer_steps[0], np.int32(1)
    stacked_state = stacked(states) if optimizer.per_replica else states[0]
    expected, state = outer_step.run(stacked(params), stacked_state, row)

    split = split_outer_step(make, outer_step.name)
    messages = split.messages(params[0], states[0])
    codes = [split.send(*replica) for replica in zip(params, states, strict=True)]
    partners = (1, 0, 3, 2) if name in PAIRWISE_RULES else None
    for number in range(COUNT):
        senders = [partners[number]] if partners else range(COUNT)
        received = [
            jax.tree.map(
                lambda *each: sum(each) / len(each), *(decode(message, codes[sender][k]) for sender in senders)
            )
            for k, message in enumerate(messages)
        ]
        received_params, outer = split.receive(params[number], states[number], received)
        assert_same(received_params, row_of(expected, number))
        assert_same(outer, row_of(state, number) if optimizer.per_replica else state)


@pytest.mark.parametrize("wire", WIRE_FORMATS)
def test_payloads_hold_the_codes_and_values_that_are_not_finite_are_detected(wire):
    config = tiny(model=SIZES, outer={"name": "diloco", "every": 4, "wire": wire}, islands={"count": 2})
    build = functools.partial(build_outer_optimizer, config.outer, model=config.model, replicas=2)
    make = lambda factory: build(exchange_factory=factory)
    split, params = split_outer_step(make, "meet"), random_params(0)
    state = make(lambda wire: make_exchange(wire, replicas=2)).init(random_params(1))

    def pack_and_check(params):
        leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(split.send(params, state))]
        payload = pack(leaves)
        jax.tree.map(np.testing.assert_array_equal, unpack(payload, leaves), leaves)
        return payload, find_defect(payload, [(wire, leaves)]), leaves

    payload, problem, leaves = pack_and_check(params)
    assert problem is None
    assert "bytes, not" in find_defect(payload[:-1], [(wire, leaves)])
    for bad in (np.nan, np.inf):
        params["embed"]["embedding"][0, 0] = bad
        assert "not finite" in pack_and_check(params)[1]
