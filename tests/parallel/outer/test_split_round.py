"""An optimizer whose meetings are cut in two does what it does in one piece, whatever the rule and the format."""

import jax
import numpy as np
import pytest
from support.equivalence import tiny

from meshwright.configs.sections.outer import PAIRED, RULES
from meshwright.parallel.outer import registry
from meshwright.parallel.outer.exchange import exchange
from meshwright.parallel.outer.split_round import apart, decoded, packed, trouble, unpacked

COUNT = 4
SIZES = {"layers": 2, "embed": 16, "vocab": 61, "heads": 2, "kv_heads": 2, "mlp": 24}


def drawn(seed):
    """Parameters named as a model's, of two layers, and a scalar."""
    draw = np.random.default_rng(seed).normal
    block = {"attn": {"q": {"kernel": draw(size=(2, 6, 10))}}, "scale": draw(size=(2,))}
    tree = {"embed": {"embedding": draw(size=(5, 6))}, "segments": {"0": {"0": {"block": block}}}}
    return jax.tree.map(lambda leaf: leaf.astype(np.float32), tree)


def stacked(trees):
    return jax.tree.map(lambda *each: np.stack(each), *trees)


def row_of(tree, number):
    return jax.tree.map(lambda leaf: leaf[number], tree)


def same(one, other):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), one, other)


@pytest.mark.parametrize("name", RULES)
def test_halves_with_the_network_between_are_the_meeting_of_the_mesh(name):
    outer = {"name": name, "every": 4} | ({"fragments": 3} if name == "streaming" else {})
    config = tiny(model=SIZES, outer=outer, islands={"count": COUNT})
    make = lambda travel: registry.build(config.outer, model=config.model, travel=travel, replicas=COUNT)
    whole = make(lambda wire: exchange(wire, replicas=COUNT))
    params, states = [drawn(seed) for seed in range(COUNT)], [whole.init(drawn(9))] * COUNT
    meeting, row = whole.meetings[0], np.int32(1)
    together = stacked(states) if whole.per_replica else states[0]
    wanted, state = meeting.run(stacked(params), together, row)

    halves = apart(make, meeting.name)
    letters = halves.letters(params[0], states[0])
    sent = [halves.outgoing(own, state) for own, state in zip(params, states, strict=True)]
    partners = (1, 0, 3, 2) if name in PAIRED else None
    for number in range(COUNT):
        whose = [partners[number]] if partners else range(COUNT)
        came = [
            jax.tree.map(lambda *each: sum(each) / len(each), *(decoded(letter, sent[one][k]) for one in whose))
            for k, letter in enumerate(letters)
        ]
        own, outer = halves.incoming(params[number], states[number], came)
        same(own, row_of(wanted, number))
        same(outer, row_of(state, number) if whole.per_replica else state)


@pytest.mark.parametrize("wire", ["float32", "bf16", "fp8", "int8", "e3m0"])
def test_bytes_hold_the_codes_and_what_is_not_finite_is_seen(wire):
    config = tiny(model=SIZES, outer={"name": "diloco", "every": 4, "wire": wire}, islands={"count": 2})
    make = lambda travel: registry.build(config.outer, model=config.model, travel=travel, replicas=2)
    halves, params = apart(make, "meet"), drawn(0)
    state = make(lambda wire: exchange(wire, replicas=2)).init(drawn(1))

    def look(params):
        leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(halves.outgoing(params, state))]
        payload = packed(leaves)
        jax.tree.map(np.testing.assert_array_equal, unpacked(payload, leaves), leaves)
        return payload, trouble(payload, [(wire, leaves)]), leaves

    payload, problem, leaves = look(params)
    assert problem is None
    assert "bytes, not" in trouble(payload[:-1], [(wire, leaves)])
    for bad in (np.nan, np.inf):
        params["embed"]["embedding"][0, 0] = bad
        assert "not finite" in look(params)[1]
