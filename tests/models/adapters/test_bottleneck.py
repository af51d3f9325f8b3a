"""Bottleneck adapters: they start at the model and compute the equations of their papers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support import adapted

from meshwright.configs.sections.adapter import AdapterConfig
from meshwright.configs.sections.model import ModelConfig
from meshwright.models.adapters import attach
from meshwright.models.context import Context
from meshwright.models.decoder import decoder_graphdef

MODEL = ModelConfig(vocab=61, vocab_multiple=8, layers=3, embed=16, heads=4, kv_heads=2, head_dim=6, mlp=20, scan=False)
CTX = Context(positions=jnp.broadcast_to(jnp.arange(12), (2, 12)))


def trees(**settings):
    adapter = AdapterConfig(**settings)
    return adapter, *adapted.adapted_weights(MODEL, adapter, scale=0.3)


def hidden(adapter, tree):
    structure = decoder_graphdef(MODEL, attach.adapter_inserter(MODEL, adapter))
    return jax.jit(lambda tree: nnx.merge(structure, tree).hidden(jnp.arange(24).reshape(2, 12), CTX)[0])(tree)


def assert_close(one, other):
    np.testing.assert_allclose(one, other, atol=2e-5 * np.abs(other).max(), rtol=0)


def layer_leaves(tree, number):
    """The leaves of one layer, from a plain or an adapted tree."""
    return jax.tree.map(lambda leaf: leaf[number], tree["segments"]["0"]["0"]["block"])


def expected_update(own, read, scale):
    own = {name: np.asarray(leaf) for name, leaf in own.items()}
    return scale * (np.maximum(read @ own["down"] + own["down_bias"], 0) @ own["up"] + own["up_bias"])


@pytest.mark.parametrize("method", ["serial", "parallel"])
def test_a_block_computes_the_equations_of_the_paper(method):
    adapter, base, initial, perturbed = trees(method=method, rank=3, alpha=12.0)
    assert_close(hidden(adapter, initial), hidden(None, base))

    def block(own, tree):
        structure = decoder_graphdef(MODEL, attach.adapter_inserter(MODEL, own))
        found = nnx.split(nnx.merge(structure, tree).segments["0"]["0"].block)[0]
        return nnx.merge(found, layer_leaves(tree, 1))

    plain, whole = block(None, base), layer_leaves(perturbed, 1)
    x = jax.random.normal(jax.random.key(2), (2, 12, 16))
    y = plain.attn(plain.attn_norm(x), CTX)[0]
    if method == "serial":
        y = y + expected_update(whole["attn"]["adapter"], y, 4.0)
    middle = x + y
    normed = plain.mlp_norm(middle)
    y = plain.mlp(normed, CTX)
    y = y + expected_update(whole["mlp"]["adapter"], y if method == "serial" else normed, 4.0)
    assert_close(block(adapter, perturbed)(x, CTX)[0], middle + y)


def test_only_the_last_layers_have_an_adapter():
    adapter, base, _, perturbed = trees(method="serial", rank=3, layers=1, targets=["attn"])
    own = perturbed["segments"]["0"]["0"]["block"]
    assert "adapter" not in own["mlp"] and own["attn"]["adapter"]["scale"][:, 0].tolist() == [0, 0, 1]
    off = jax.tree.map(lambda leaf: leaf, perturbed)
    scale = own["attn"]["adapter"]["scale"]
    off["segments"]["0"]["0"]["block"]["attn"]["adapter"]["scale"] = 0 * scale
    assert_close(hidden(adapter, off), hidden(None, base))


def test_mix_and_match_is_a_prefix_and_a_parallel_adapter():
    adapter, _, initial, perturbed = trees(method="mam", rank=3, length=4)
    params = attach.flatten(attach.split_trained(initial, MODEL, adapter)[0])
    block = "segments/0/0/block"
    ends = [f"{block}/attn/prefix/k", f"{block}/attn/prefix/v"]
    ends += [f"{block}/mlp/adapter/{name}" for name in ("down", "down_bias", "up", "up_bias")]
    assert sorted(params) == sorted(ends)
    prefix = AdapterConfig(method="prefix", length=4)
    separate = attach.flatten(initial)
    separate = attach.unflatten({path: leaf for path, leaf in separate.items() if "/mlp/adapter/" not in path})
    assert_close(hidden(adapter, initial), hidden(prefix, separate))
    assert np.abs(hidden(adapter, perturbed) - hidden(adapter, initial)).max() > 0.01
