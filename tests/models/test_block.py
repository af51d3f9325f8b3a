"""One block: the tensor names of memory policies, and dropout by row and layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend.core import subjaxprs
from support.weights import random_weights

from meshwright.configs.sections.model import ModelConfig
from meshwright.memory import policy
from meshwright.models import decoder
from meshwright.models.block import Block
from meshwright.models.context import Context
from meshwright.models.decoder import decoder_graphdef, layer_context
from meshwright.models.layers import dropout

TINY = {"vocab": 61, "vocab_multiple": 8, "layers": 3, "embed": 16, "heads": 4, "kv_heads": 2, "mlp": 20}
BLOCKS = {
    "llama": {},
    "gpt2": {"family": "gpt2"},
    "gemma3": {"family": "gemma3"},
    "parallel": {"parallel_block": True, "activation": "geglu"},
}


def emitted_names(jaxpr) -> set[str]:
    """All names that pass through `checkpoint_name` in a program."""
    result = {eqn.params["name"] for eqn in jaxpr.eqns if eqn.primitive.name == "name"}
    return result.union(*(emitted_names(inner) for inner in subjaxprs(jaxpr)))


@pytest.mark.parametrize("settings", BLOCKS.values(), ids=BLOCKS)
def test_a_block_emits_exactly_the_names_a_policy_may_use(settings):
    model = ModelConfig(**TINY | settings)
    positions = jnp.arange(6)[None]

    def run(x):
        block = Block(model, kind=None, rngs=nnx.Rngs(params=jax.random.key(0)))
        return jax.vjp(lambda x: block(x, Context(positions=positions))[0], x)[1](x)

    jaxpr = jax.make_jaxpr(run)(jnp.ones((1, 6, 16)))
    assert emitted_names(jaxpr.jaxpr) == set(policy.emitted_tensors(model))


def after_dropout(keys, **settings):
    """hidden [rows, 2, embed] after five layers with dropout; every row has the same two tokens."""
    model = ModelConfig(**TINY | {"layers": 5}, dropout=0.5, windows=[2, None], **settings)

    @jax.jit
    def hidden(keys):
        tokens = jnp.zeros((len(keys), 2), jnp.int32)
        ctx = Context(positions=jnp.zeros_like(tokens), dropout_keys=keys)
        return nnx.merge(decoder_graphdef(model), random_weights(model)).hidden(tokens, ctx)[0]

    return np.asarray(hidden(keys))


def test_dropout_follows_a_rows_key_and_a_layers_number():
    keys = jax.random.split(jax.random.key(0), 4)
    out = after_dropout(keys)
    assert len(np.unique(out.reshape(4, -1).round(4), axis=0)) == 4
    np.testing.assert_allclose(after_dropout(keys[::-1], scan=False), out[::-1], atol=1e-5)


def test_layers_are_numbered_through_all_segments(monkeypatch):
    numbers = []
    monkeypatch.setattr(decoder, "layer_context", lambda ctx, layer, *parts: numbers.append(int(layer)) or ctx)
    monkeypatch.setattr(decoder, "run_block", lambda graph, weights, x, ctx: (x, None))
    model = ModelConfig(**TINY | {"layers": 5}, windows=[2, None], scan=False)
    tokens = jnp.zeros((1, 2), jnp.int32)
    nnx.merge(decoder_graphdef(model), random_weights(model)).hidden(tokens, Context(positions=tokens))
    assert numbers == [0, 1, 2, 3, 4]


def test_layers_and_both_updates_of_a_block_drop_different_elements():
    keys = jax.random.split(jax.random.key(0), 2)
    ctx = Context(positions=jnp.zeros((2, 1)), dropout_keys=keys)
    masks = [
        dropout(jnp.ones((2, 2000)), layer_context(ctx, layer, None).dropout_keys, rate=0.25, salt=salt)
        for layer in (0, 1)
        for salt in (0, 1)
    ]
    masks = np.concatenate(masks)  # [two rows of each of four, elements]
    np.testing.assert_allclose(np.unique(masks), [0, 1 / 0.75], rtol=1e-6)
    np.testing.assert_allclose(masks.mean(axis=1), 1, atol=0.05)
    assert np.abs(np.corrcoef(masks) - np.eye(8)).max() < 0.1
