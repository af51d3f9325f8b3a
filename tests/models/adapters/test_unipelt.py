"""UniPELT: three parts behind gates of each token, so that no token depends on later ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support import adapted

from meshwright.configs.errors import UserError
from meshwright.configs.sections.adapter import AdapterConfig
from meshwright.configs.sections.model import ModelConfig
from meshwright.models import kv_cache as caches
from meshwright.models.adapters import attach
from meshwright.models.adapters.merge import merge_adapters
from meshwright.models.attention.blockwise import BLOCKWISE
from meshwright.models.attention.dense import DENSE
from meshwright.models.attention.interface import attend
from meshwright.models.context import Context
from meshwright.models.decoder import decoder_graphdef
from meshwright.train.infer.generate import context_at

MODEL = ModelConfig(vocab=61, vocab_multiple=8, layers=3, embed=16, heads=4, kv_heads=2, head_dim=6, mlp=20)
ADAPTER = AdapterConfig(method="unipelt", length=3, rank=4, ranks={"layers/0/attn/q": 2, "layers/1/mlp": 5, "mlp": 6})
SECOND, LENGTH = 5, 12  # where the second document of a row begins, and the row ends
TOKENS = np.random.default_rng(0).integers(0, 61, (2, LENGTH))
PACKED = {
    "positions": jnp.asarray([[*range(SECOND), *range(LENGTH - SECOND)]] * 2),
    "segment_ids": jnp.asarray([[1] * SECOND + [2] * (LENGTH - SECOND)] * 2),
}
BLOCK = "segments/0/0/block"


@pytest.fixture(scope="module")
def trees():
    return adapted.adapted_weights(MODEL, ADAPTER, scale=0.5)


def decoder_of(adapter, tree):
    return nnx.merge(decoder_graphdef(MODEL, attach.adapter_inserter(MODEL, adapter)), tree)


def hidden(adapter, tree, tokens, **fields):
    """The input of the head."""
    tokens = jnp.asarray(tokens)
    fields = {"positions": jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)} | fields
    return jax.jit(lambda tree: decoder_of(adapter, tree).hidden(tokens, Context(**fields))[0])(tree)


def assert_close(one, other):
    np.testing.assert_allclose(one, other, atol=2e-5 * np.abs(other).max(), rtol=0)


def layer_leaves(tree, path):
    """The leaves of one part of layer 1, in numpy."""
    return {name: np.asarray(leaf[1]) for name, leaf in attach.subtree(tree, f"{BLOCK}/{path}").items()}


def expected_gate(own, x):
    return 1 / (1 + np.exp(-(x @ own["gate"] + own["gate_bias"])))


def test_a_block_computes_the_equations_of_the_paper(trees):
    """A query attends as with method `prefix` to the prefix times the query's gate."""
    base, _, tree = trees
    plain, whole = (
        decoder_of(adapter, own).segments["0"]["0"].block for adapter, own in ((None, base), (ADAPTER, tree))
    )
    graphs, states = zip(*(nnx.split(block) for block in (plain, whole)), strict=True)
    plain, whole = (nnx.merge(g, jax.tree.map(lambda leaf: leaf[1], s)) for g, s in zip(graphs, states, strict=True))
    ctx = Context(positions=jnp.broadcast_to(jnp.arange(LENGTH), (2, LENGTH)))
    x = jax.random.normal(jax.random.key(2), (2, LENGTH, 16))
    normed = np.asarray(plain.attn_norm(x))

    def with_lora(name):
        linear, own = getattr(plain.attn, name), layer_leaves(tree, f"attn/{name}/adapter")
        added = np.einsum("bse,er,rhd->bshd", normed, own["a"] * own["scale"], own["b"])
        gate = expected_gate(own, normed)[..., None, None]
        return lambda x, ctx: linear(x, ctx) + gate * added

    plain.attn.q, plain.attn.v = with_lora("q"), with_lora("v")
    prefix = layer_leaves(tree, "attn/prefix")

    own = {}
    plain.attn.prefix = lambda x, ctx: (own, ctx.attend)

    def seen(gate):
        own.update({name: gate * prefix[name] for name in ("k", "v")})
        return plain.attn(jnp.asarray(normed), ctx)[0]

    every = jax.jit(jax.vmap(seen))(expected_gate(prefix, normed).reshape(-1)).reshape(2, LENGTH, *x.shape)
    middle = x + jnp.einsum("rtrte->rte", every)  # of each token, what it sees through its own gate
    made, own = np.asarray(plain.mlp(plain.mlp_norm(middle), ctx)), layer_leaves(tree, "mlp/adapter")
    added = np.maximum(made @ own["down"] + own["down_bias"], 0) @ own["up"] + own["up_bias"]
    assert_close(whole(x, ctx)[0], middle + made + expected_gate(own, made)[..., None] * added)


def test_a_token_does_not_depend_on_later_tokens(trees):
    _, _, tree = trees
    other = TOKENS.copy()
    other[:, 8] = (other[:, 8] + 7) % 61
    one, changed = (hidden(ADAPTER, tree, tokens) for tokens in (TOKENS, other))
    np.testing.assert_array_equal(one[:, :8], changed[:, :8])
    assert np.abs(one - changed)[:, 8:].max(axis=(0, 2)).min() > 1e-3


@pytest.mark.parametrize("implementation", [DENSE, BLOCKWISE], ids=lambda one: one.name)
def test_documents_of_one_row_do_not_depend_on_each_other(trees, implementation):
    _, _, tree = trees
    fields = {"attend": lambda *given: attend(implementation, *given)}
    packed = hidden(ADAPTER, tree, TOKENS, **PACKED, **fields)
    for separate in (slice(0, SECOND), slice(SECOND, LENGTH)):
        assert_close(packed[:, separate], hidden(ADAPTER, tree, TOKENS[:, separate], **fields))


def test_generation_computes_gates_of_new_tokens_only(trees):
    """Ten tokens and then one more with a cache give the output of all eleven at once."""
    _, _, tree = trees
    tokens = jnp.asarray(TOKENS[:, :11])
    expected = hidden(ADAPTER, tree, tokens)
    ctx = Context(positions=jnp.zeros((1, 1), jnp.int32))
    cache = caches.empty_cache(MODEL, rows=2, capacity=11, ctx=ctx)
    for own in (slice(0, 10), slice(10, 11)):
        index = jnp.arange(11)[own]
        step_ctx = context_at(ctx, attention=DENSE, index=index, first=jnp.zeros((2, 1), jnp.int32), cache=cache)
        actual, entries = jax.jit(
            lambda tree, step_ctx=step_ctx, own=own: decoder_of(ADAPTER, tree).hidden(tokens[:, own], step_ctx)
        )(tree)
        assert_close(actual, expected[:, own])
        cache = caches.write_entries(cache, entries, index=index[0])


def test_unipelt_starts_as_a_prefix_with_gates_near_one_half(trees):
    """Gates are near one half, LoRA and the perceptron add nothing, and layers have their own ranks."""
    base, tree, _ = trees
    leaves = attach.flatten(tree)
    even = {path: 0 * leaf if path.endswith("/gate") else leaf for path, leaf in leaves.items()}
    half = attach.flatten(base) | {
        f"{BLOCK}/attn/prefix/{name}": 0.5 * leaves[f"{BLOCK}/attn/prefix/{name}"] for name in ("k", "v")
    }
    prefix_only = hidden(AdapterConfig(method="prefix", length=3), attach.unflatten(half), TOKENS)
    assert_close(hidden(ADAPTER, attach.unflatten(even), TOKENS), prefix_only)
    gates = [np.asarray(leaf) for path, leaf in leaves.items() if path.endswith("/gate")]
    assert len(gates) == 4 and all(0.01 < gate.std() < 0.03 for gate in gates)
    widths = {
        path: (leaves[f"{BLOCK}/{path}"] != 0).any(-2).sum(-1).tolist()
        for path in ("attn/q/adapter/a", "mlp/adapter/down")
    }
    assert widths == {"attn/q/adapter/a": [4, 4, 4], "mlp/adapter/down": [6, 5, 6]}
    assert leaves[f"{BLOCK}/attn/q/adapter/scale"].sum(-1).tolist() == [2, 4, 4]


def test_exactly_the_trained_leaves_have_a_gradient(trees):
    base, _, tree = trees
    params, frozen = attach.split_trained(tree, MODEL, ADAPTER)

    def loss(params):
        whole = attach.unflatten(attach.flatten(params) | attach.flatten(frozen))
        ctx = Context(positions=jnp.broadcast_to(jnp.arange(LENGTH), (2, LENGTH)))
        return jnp.square(decoder_of(ADAPTER, whole).hidden(jnp.asarray(TOKENS), ctx)[0]).mean(where=jnp.arange(16) < 9)

    gradient = attach.flatten(jax.jit(jax.grad(loss))(params))
    factors = {"a", "b"}, {"k", "v"}, {"down", "down_bias", "up", "up_bias"}
    places = "attn/q/adapter", "attn/v/adapter", "attn/prefix", "mlp/adapter"
    own = {
        f"{BLOCK}/{place}/{leaf}"
        for place, leaves in zip(places, factors[:1] + factors, strict=True)
        for leaf in leaves
    }
    assert gradient.keys() == own | {f"{BLOCK}/{place}/{leaf}" for place in places for leaf in ("gate", "gate_bias")}
    assert all(np.abs(leaf).max(axis=tuple(range(1, leaf.ndim))).min() > 0 for leaf in gradient.values())
    assert attach.flatten(frozen).keys() - attach.flatten(base).keys() == {
        f"{BLOCK}/{place}/scale" for place in places if place != "attn/prefix"
    }


def test_conflicting_settings_are_refused(trees):
    with pytest.raises(UserError, match=r"adapter\.ranks: k matches nothing; there are attn/q, attn/v, mlp"):
        attach.init_adapters(trees[0], MODEL, AdapterConfig(method="unipelt", ranks={"k": 3}), jax.random.key(1))
    with pytest.raises(UserError, match=r"adapter\.method: unipelt cannot be merged"):
        merge_adapters(trees[1], MODEL, ADAPTER)
