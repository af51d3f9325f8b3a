"""Fragments: together they are the model, each array in one of them, taken out and put back where it was."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.equivalence import tiny

from meshwright.models.decoder import initial_params
from meshwright.parallel.layout import to_canonical
from meshwright.parallel.outer.fragment_slices import cut
from meshwright.parallel.outer.fragments import fragments, offsets

MODELS = {"plain": {"layers": 5}, "windows": {"layers": 7, "windows": [4, 8, None]}, "one": {"layers": 1}}


@pytest.fixture(params=MODELS)
def model(request):
    return tiny(model=MODELS[request.param] | {"embed": 8, "mlp": 8}).model


def of(tree, replica):
    return jax.tree.map(lambda leaf: leaf[replica], tree)


@pytest.mark.parametrize("order", ["strided", "sequential"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_every_array_is_in_exactly_one_fragment_and_comes_back_to_its_place(model, order, count):
    """Two replicas' parameters, taken apart, changed by a number a fragment, and put together again."""
    params = initial_params(model, jax.random.key(0))
    both = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf + 1]), params)
    found, parts = both, fragments(model.layers, count=min(count, model.layers + 1), order=order)
    for number, part in enumerate(parts):
        piece = cut(part, model).take(both, 1)
        found = cut(part, model).put(found, {path: leaf + 10 * (number + 1) for path, leaf in piece.items()}, 1)
    for replica in range(2):
        before, after = (to_canonical(of(tree, replica), model) for tree in (both, found))
        for name, array in before.items():
            owner = [number for number, part in enumerate(parts) if part.owns(name)]
            assert len(owner) == 1
            np.testing.assert_allclose(after[name], array + 10 * (owner[0] + 1), rtol=1e-6, err_msg=name)


def test_strided_fragments_hold_every_nth_layer_and_take_turns_evenly():
    parts = fragments(8, count=5, order="strided")
    assert [part.layers for part in parts] == [(), (0, 4), (1, 5), (2, 6), (3, 7)]
    assert [part.ends for part in parts] == [True, False, False, False, False]
    assert offsets(4, every=100) == [0, 25, 50, 75]
