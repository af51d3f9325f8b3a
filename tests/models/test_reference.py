"""Every setting of the decoder against plain numpy: logits, and the tokens that each logit depends on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support.reference_model import logits as reference_logits
from support.weights import by_canonical_name, random_weights

from meshwright.configs.sections.model import FAMILIES, ModelConfig
from meshwright.models.context import Context, flat_linear, no_constraint
from meshwright.models.decoder import decoder_graphdef, initial_params
from meshwright.models.logical_axes import axis_names
from meshwright.parallel import vocabulary
from meshwright.parallel.sharding import path_name

TINY = {"vocab": 61, "vocab_multiple": 8, "layers": 2, "embed": 16, "heads": 4, "head_dim": 8, "mlp": 20}
TINY |= {"max_positions": 64}
# Short wavelengths against original_length, so that every regime of a stretching rule has a pair and a position.
STRETCHED = {"theta": 50.0, "factor": 4.0, "original_length": 16}

MODELS = {f"family {family}": {"family": family} for family in FAMILIES} | {
    "grouped heads": {"kv_heads": 2},
    "one key head": {"kv_heads": 1},
    "biases on q, k, v": {"qkv_bias": True, "kv_heads": 2},
    "biases everywhere, gated": {"qkv_bias": True, "linear_bias": True},
    "head norms": {"qk_norm": True, "kv_heads": 2},
    "head norms, unit offset": {"qk_norm": True, "norm_unit_offset": True},
    "layer norm, rotation": {"norm": "layer", "norm_epsilon": 0.01},
    "geglu": {"activation": "geglu"},
    "gelu": {"activation": "gelu", "linear_bias": True},
    "linear stretching": {"rope": STRETCHED | {"scaling": "linear"}},
    "llama3 stretching": {"rope": STRETCHED | {"scaling": "llama3", "original_length": 64}},
    "yarn": {"rope": STRETCHED | {"scaling": "yarn", "beta_fast": 2.0, "beta_slow": 0.2}},
    "yarn, stated factor": {"rope": STRETCHED | {"scaling": "yarn", "attention_factor": 1.7}},
    "stretched windows": {"windows": [3, None], "rope": STRETCHED | {"scaling": "linear"}},
    "stretched, own local theta": {
        "windows": [3, None],
        "rope": STRETCHED | {"scaling": "llama3", "local_theta": 10.0},
    },
    "no positions": {"position_encoding": "none"},
    "learned positions": {"position_encoding": "learned"},
    "tied embeddings, scaled": {"tied_embeddings": True, "embedding_scale": True},
    "pattern of windows and a rest": {"layers": 7, "windows": [2, 5, None]},
    "unrolled": {"layers": 5, "windows": [2, None], "scan": False},
    "soft-caps": {"attention_softcap": 0.7, "logit_softcap": 1.5},
    "attention scale": {"attention_scale": 0.9},
    "parallel block": {"parallel_block": True, "norm": "layer"},
    "parallel block, post norms": {"parallel_block": True, "post_norms": True},
    "post norms": {"post_norms": True},
}


def packed_rows() -> dict[str, np.ndarray]:
    """Two rows of 24 tokens: two documents and padding, and one document that starts at position 30."""
    segments = np.array([[1] * 13 + [2] * 8 + [0] * 3, [5] * 24], np.int32)
    positions = np.array([[*range(13), *range(8), *range(3)], [*range(30, 54)]], np.int32)
    tokens = np.random.default_rng(0).integers(0, 61, (2, 24), dtype=np.int32)
    return {"tokens": tokens, "segments": segments, "positions": positions}


def forward(model: ModelConfig, params, tokens, segments, positions, linear=flat_linear):
    """Logits [rows, sequence, padded_vocab]."""
    ctx = Context(positions=positions, segment_ids=segments, linear=linear)
    decoder = nnx.merge(decoder_graphdef(model), params)
    hidden, _ = decoder.hidden(tokens, ctx)
    kernel = decoder.head_kernel(jnp.float32)
    return vocabulary.compute_logits(
        hidden, kernel, vocab=model.vocab, softcap=model.logit_softcap, constrain=no_constraint
    )


@pytest.mark.parametrize("settings", MODELS.values(), ids=MODELS)
def test_logits_equal_the_reference(settings):
    model = ModelConfig(**TINY | {"kv_heads": None} | settings)
    rows, params = packed_rows(), random_weights(model)
    actual = np.asarray(jax.jit(lambda params, rows: forward(model, params, **rows))(params, rows))
    expected = reference_logits(model, by_canonical_name(model, params), **rows)
    assert np.all(actual[..., model.vocab :] == -np.inf), "padding of the vocabulary is not masked out"
    np.testing.assert_allclose(actual[..., : model.vocab], expected, atol=1e-5 * np.abs(expected).max(), rtol=0)


@pytest.mark.parametrize("window", [None, 3])
def test_a_logit_depends_on_exactly_the_tokens_it_may_see(window):
    """By gradient, which is zero outside of earlier tokens of the same document within all layers' windows."""
    model = ModelConfig(**TINY, windows=[window])
    params, rows = random_weights(model), packed_rows()
    rows["tokens"] = np.stack([np.arange(24), np.arange(24) + 30]).astype(np.int32)  # each its own row of the table

    def total(params, row, position):
        return jnp.sum(forward(model, params, **rows)[row, position, : model.vocab])

    reach = 24 if window is None else model.layers * (window - 1)
    gradient = jax.jit(jax.grad(total))
    for row, position in ((0, 0), (0, 9), (0, 15), (1, 12), (1, 23)):
        table = np.abs(gradient(params, row, position)["embed"]["embedding"]).max(axis=1)[rows["tokens"]]
        same = rows["segments"][row] == rows["segments"][row, position]
        distance = position - np.arange(24)
        expected = np.zeros((2, 24), bool)
        expected[row] = same & (distance >= 0) & (distance <= reach)
        np.testing.assert_array_equal(table != 0, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_weight_has_a_name_for_each_dimension(family):
    model = ModelConfig(**TINY | {"family": family, "layers": 7})
    weights = jax.eval_shape(lambda: initial_params(model, jax.random.key(0)))
    for path, leaf in jax.tree_util.tree_leaves_with_path(weights):
        name = path_name(path)
        assert leaf.ndim == len(axis_names(name)) + name.startswith("segments/"), name
