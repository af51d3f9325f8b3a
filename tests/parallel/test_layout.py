"""Canonical names: one unpadded array a layer, and the way back."""

import jax
import numpy as np
import pytest
from equivalence import tiny
from meshwright.models.decoder import initial_params
from meshwright.parallel.layout import canonical, from_canonical

MODELS = {
    "two layers": {},
    "pattern with a rest": {"layers": 5, "windows": [4, None]},
    "tied": {"tied_embeddings": True},
}


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_canonical_is_invertible_and_unpadded(model):
    config = tiny(model=model).model
    params = initial_params(config, jax.random.key(0))
    arrays = canonical({"params": params}, config)
    assert {name.split("/")[2] for name in arrays if name.startswith("params/layers/")} == set(
        map(str, range(config.layers))
    )
    assert arrays["params/embed/embedding"].shape == (61, 16)
    assert arrays[f"params/layers/{config.layers - 1}/attn/q/kernel"].shape == (16, 4, 4)
    jax.tree.map(np.testing.assert_array_equal, params, from_canonical(arrays, {"params": params}, config)["params"])


def test_layers_are_numbered_through_the_pattern():
    """Layer 3 of the pattern [window, full] is the second repeat of its second place."""
    config = tiny(model={"layers": 5, "windows": [4, None]}).model
    params = initial_params(config, jax.random.key(0))
    arrays = canonical(params, config)
    stack = params["segments"]["0"]["1"]["block"]["mlp"]["up"]["kernel"]
    np.testing.assert_array_equal(arrays["layers/3/mlp/up/kernel"], stack[1])
    np.testing.assert_array_equal(
        arrays["layers/4/mlp/up/kernel"], params["segments"]["1"]["0"]["block"]["mlp"]["up"]["kernel"][0]
    )
