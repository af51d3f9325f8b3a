"""Prefixes, prompts and trained tokens: equal to a model that reads them as tokens."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from meshwright.configs.errors import UserError
from meshwright.configs.loader import validate_tree
from meshwright.configs.sections.adapter import AdapterConfig
from meshwright.configs.sections.model import ModelConfig
from meshwright.models import kv_cache as caches
from meshwright.models.adapters import attach
from meshwright.models.adapters.merge import merge_adapters
from meshwright.models.attention.blockwise import BLOCKWISE
from meshwright.models.attention.dense import DENSE
from meshwright.models.attention.interface import attend
from meshwright.models.context import Context
from meshwright.models.decoder import decoder_graphdef, initial_params
from meshwright.train.infer.generate import context_at

MODEL = ModelConfig(vocab=61, vocab_multiple=8, layers=3, embed=16, heads=4, kv_heads=2, head_dim=6, mlp=20)
LEARNED = MODEL.model_copy(update={"position_encoding": "learned", "max_positions": 32, "scan": False})
KEY = jax.random.key(1)
AHEAD = {"method": "prompt", "length": 5}
SECOND = 7  # where the second document of a row begins
LENGTH = 16
TOKENS = np.random.default_rng(0).integers(0, 61, (2, LENGTH))
PACKED = {
    "positions": jnp.asarray([[*range(SECOND), *range(LENGTH - SECOND)]] * 2),
    "segment_ids": jnp.asarray([[1] * SECOND + [2] * (LENGTH - SECOND)] * 2),
}


@functools.cache
def weights(model):
    random = np.random.default_rng(0)
    initial = jax.jit(lambda: initial_params(model, jax.random.key(0)))()
    return jax.tree.map(lambda leaf: leaf + 0.1 * random.normal(size=leaf.shape).astype(np.float32), initial)


def hidden(model, adapter, tree, tokens, **fields):
    """The input of the head."""
    tokens = jnp.asarray(tokens)
    fields = {"positions": jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)} | fields
    structure = decoder_graphdef(model, attach.adapter_inserter(model, adapter))
    return jax.jit(lambda tree: nnx.merge(structure, tree).hidden(tokens, Context(**fields))[0])(tree)


def init_tree(model, **settings):
    adapter = AdapterConfig(**settings)
    base = weights(model)
    return base, adapter, jax.jit(lambda base: attach.init_adapters(base, model, adapter, KEY))(base)


def assert_close(one, other):
    np.testing.assert_allclose(one, other, atol=2e-5 * np.abs(other).max(), rtol=0)


@pytest.mark.parametrize("model", [MODEL, LEARNED], ids=["rope", "learned"])
@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_an_untrained_prompt_equals_that_many_tokens_before_every_document(method, model):
    """Both start as tokens: each of two packed documents equals the plain model's output after these tokens."""
    base, adapter, tree = init_tree(model, method=method, length=5)
    first = jax.random.randint(KEY, (5,), 0, model.vocab)
    for attention in ({}, {"attend": lambda *given: attend(BLOCKWISE, *given)}):
        packed = hidden(model, adapter, tree, TOKENS, **PACKED, **attention)
        for part in (slice(0, SECOND), slice(SECOND, LENGTH)):
            separate = TOKENS[:, part]
            full = hidden(model, None, base, np.concatenate([np.tile(first, (2, 1)), separate], axis=1))
            assert_close(packed[:, part], full[:, 5:])


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_generation_reads_the_prompt_at_every_step(method):
    """Ten tokens and then one more with a cache give the output of all eleven at once."""
    _, adapter, tree = init_tree(MODEL, method=method, length=5)
    tokens = jnp.asarray(TOKENS[:, :11])
    expected = hidden(MODEL, adapter, tree, tokens)
    decoder = nnx.merge(decoder_graphdef(MODEL, attach.adapter_inserter(MODEL, adapter)), tree)
    ctx = Context(positions=jnp.zeros((1, 1), jnp.int32))
    cache = caches.empty_cache(MODEL, rows=2, capacity=11, ctx=ctx)
    for part in (slice(0, 10), slice(10, 11)):
        index = jnp.arange(11)[part]
        step_ctx = context_at(ctx, attention=DENSE, index=index, first=jnp.zeros((2, 1), jnp.int32), cache=cache)
        actual, entries = decoder.hidden(tokens[:, part], step_ctx)
        assert_close(actual, expected[:, part])
        cache = caches.write_entries(cache, entries, index=index[0])


def test_p_tuning_equals_the_prompt_that_its_perceptron_computes():
    base, adapter, tree = init_tree(MODEL, method="p-tuning", length=5)
    encoder = {name: np.asarray(leaf) for name, leaf in tree["prompt"].items()}
    one = np.maximum(encoder["seeds"] @ encoder["w1"] + encoder["b1"], 0)
    rows = np.maximum(one @ encoder["w2"] + encoder["b2"], 0) @ encoder["w3"] + encoder["b3"]
    prompt = AdapterConfig(**AHEAD)
    same = hidden(MODEL, prompt, base | {"prompt": {"rows": jnp.asarray(rows)}}, TOKENS)
    assert_close(hidden(MODEL, adapter, tree, TOKENS), same)


@pytest.mark.parametrize("tied", [True, False])
def test_trained_tokens_are_rows_of_the_table(tied):
    """Untrained rows change nothing; trained rows equal the model with those rows, also in a tied head."""
    model = MODEL.model_copy(update={"tied_embeddings": tied})
    base, adapter, tree = init_tree(model, method="tokens", tokens=[int(TOKENS[0, 3]), 5])
    assert_close(hidden(model, adapter, tree, TOKENS), hidden(model, None, base, TOKENS))
    tree["embed"]["adapter"]["rows"] += 1.0
    merged = merge_adapters(tree, model, adapter)
    assert jax.tree.structure(merged) == jax.tree.structure(base)
    perturbed = np.abs(merged["embed"]["embedding"] - base["embed"]["embedding"]).max(axis=1)
    assert sorted(np.flatnonzero(perturbed > 0.5)) == sorted(adapter.tokens)
    assert_close(hidden(model, adapter, tree, TOKENS), hidden(model, None, merged, TOKENS))
    decoders = [
        nnx.merge(decoder_graphdef(model, attach.adapter_inserter(model, own)), given)
        for own, given in ((adapter, tree), (None, merged))
    ]
    assert_close(*(decoder.head_kernel(jnp.float32) for decoder in decoders))


@pytest.mark.parametrize(("method", "ends"), [("prefix", {"k", "v"}), ("prompt", {"rows"}), ("tokens", {"rows"})])
def test_the_trained_leaves_are_those_of_the_method(method, ends):
    more = {"tokens": [3]} if method == "tokens" else {}
    _, adapter, tree = init_tree(MODEL, method=method, **more)
    params, frozen = (attach.flatten(part) for part in attach.split_trained(tree, MODEL, adapter))
    assert {path.rpartition("/")[2] for path in params} == ends
    assert frozen.keys() - attach.flatten(weights(MODEL)).keys() == ({"embed/adapter/numbers"} & frozen.keys())


def test_merging_a_method_that_no_weight_can_express_is_refused():
    _, adapter, tree = init_tree(MODEL, **AHEAD)
    with pytest.raises(UserError, match=r"adapter\.method: prompt cannot be merged"):
        merge_adapters(tree, MODEL, adapter)


MISTAKES = {
    "windows": ({"model": {"windows": [4, None]}, "adapter": AHEAD}, "adapter.method: prompt .*model.windows"),
    "a cut row": ({"mesh": {"seq": 2, "devices": 2}, "adapter": AHEAD}, "mesh.seq: 2, but adapter.method prompt needs"),
    "stages": ({"mesh": {"pipe": 2, "devices": 2}, "adapter": AHEAD}, "mesh.pipe: 2, but adapter.method prompt needs"),
    "no position": (
        {"model": {"position_encoding": "learned", "max_positions": 258}, "adapter": AHEAD},
        "adapter.length: 5 and data.sequence_length .* exceed",
    ),
    "no such token": ({"adapter": {"method": "tokens", "tokens": [999999]}}, "adapter.tokens: 999999 "),
    "no tokens": ({"adapter": {"method": "tokens"}}, "adapter.tokens: .*"),
    "targets": ({"adapter": AHEAD | {"targets": ["q"]}}, "adapter.targets: .* prompt"),
}


@pytest.mark.parametrize(("given", "words"), MISTAKES.values(), ids=MISTAKES)
def test_unsupported_settings_are_refused_before_the_run(given, words):
    with pytest.raises(UserError, match=words):
        validate_tree({"name": "mine", "data": {"source": "stdlib", "sequence_length": 256}} | given)
