"""Canonical names: one unpadded array for each layer, and the inverse."""

import jax
import numpy as np
import pytest
from support.equivalence import tiny

from meshwright.models.decoder import initial_params
from meshwright.parallel.layout import canonical_slices, from_canonical, to_canonical


def weights(model):
    """Random parameters, quickly; padding of the vocabulary is zero."""
    random = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: initial_params(model, jax.random.key(0)))
    params = jax.tree.map(lambda leaf: random.standard_normal(leaf.shape, np.float32), shapes)
    params["embed"]["embedding"][model.vocab :] = 0
    if not model.tied_embeddings:
        params["head"]["kernel"][:, model.vocab :] = 0
    return params


MODELS = {
    "two layers": {},
    "pattern with a rest": {"layers": 5, "windows": [4, None]},
    "tied": {"tied_embeddings": True},
}


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_canonical_is_invertible_and_unpadded(model):
    config = tiny(model=model).model
    params = weights(config)
    arrays = to_canonical({"params": params}, config)
    assert {name.split("/")[2] for name in arrays if name.startswith("params/layers/")} == set(
        map(str, range(config.layers))
    )
    assert arrays["params/embed/embedding"].shape == (61, 16)
    assert arrays[f"params/layers/{config.layers - 1}/attn/q/kernel"].shape == (16, 4, 4)
    jax.tree.map(np.testing.assert_array_equal, params, from_canonical(arrays, {"params": params}, config)["params"])


def test_layers_are_numbered_in_the_order_of_the_model():
    """Layer 3 of the pattern [window, full] is the second repeat of its second position."""
    config = tiny(model={"layers": 5, "windows": [4, None]}).model
    params = weights(config)
    arrays = to_canonical(params, config)
    stack = params["segments"]["0"]["1"]["block"]["mlp"]["up"]["kernel"]
    np.testing.assert_array_equal(arrays["layers/3/mlp/up/kernel"], stack[1])
    np.testing.assert_array_equal(
        arrays["layers/4/mlp/up/kernel"], params["segments"]["1"]["0"]["block"]["mlp"]["up"]["kernel"][0]
    )


UP = "opt_state/adafactor/v/segments/0/0/block/mlp/up/kernel"


def test_a_missing_statistic_has_no_canonical_name():
    """optax keeps a single zero where adafactor has no statistic: it belongs to no layer."""
    model = tiny(model={"layers": 3}).model
    assert canonical_slices(UP, (1,), model) == []
    assert [name for name, _ in canonical_slices(UP, (3, 16, 24), model)] == [
        f"opt_state/adafactor/v/layers/{layer}/mlp/up/kernel" for layer in range(3)
    ]


def test_a_stack_of_the_wrong_number_of_layers_is_refused():
    with pytest.raises(ValueError, match=r"mlp/up/kernel: shape \(2, 16\) does not begin with the 3 layers"):
        canonical_slices(UP, (2, 16), tiny(model={"layers": 3}).model)
