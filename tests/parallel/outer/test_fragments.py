"""Fragments: each array is in exactly one, and is inserted where it was extracted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.equivalence import tiny

from meshwright.models.decoder import initial_params
from meshwright.parallel.layout import to_canonical
from meshwright.parallel.outer.fragment_slices import slice_fragment
from meshwright.parallel.outer.fragments import fragment_offsets, split_fragments

MODELS = {"plain": {"layers": 5}, "windows": {"layers": 7, "windows": [4, 8, None]}, "one": {"layers": 1}}


@pytest.fixture(params=MODELS)
def model(request):
    return tiny(model=MODELS[request.param] | {"embed": 8, "mlp": 8}).model


def replica_tree(tree, replica):
    return jax.tree.map(lambda leaf: leaf[replica], tree)


@pytest.mark.parametrize("order", ["strided", "sequential"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_every_array_is_in_exactly_one_fragment_and_is_inserted_where_it_was(model, order, count):
    """Extract each fragment of two replicas' parameters, add a number of its own, and insert it again."""
    params = initial_params(model, jax.random.key(0))
    both = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf + 1]), params)
    result, parts = both, split_fragments(model.layers, count=min(count, model.layers + 1), order=order)
    for number, part in enumerate(parts):
        slicer = slice_fragment(part, model)
        arrays = {path: leaf + 10 * (number + 1) for path, leaf in slicer.extract(both, 1).items()}
        result = slicer.insert(result, arrays, 1)
    for replica in range(2):
        before, after = (to_canonical(replica_tree(tree, replica), model) for tree in (both, result))
        for name, array in before.items():
            owners = [number for number, part in enumerate(parts) if part.contains(name)]
            assert len(owners) == 1
            np.testing.assert_allclose(after[name], array + 10 * (owners[0] + 1), rtol=1e-6, err_msg=name)


def test_strided_fragments_have_every_nth_layer_at_even_offsets():
    parts = split_fragments(8, count=5, order="strided")
    assert [part.layers for part in parts] == [(), (0, 4), (1, 5), (2, 6), (3, 7)]
    assert [part.embed_and_head for part in parts] == [True, False, False, False, False]
    assert fragment_offsets(4, interval=100) == [0, 25, 50, 75]
