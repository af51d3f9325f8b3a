"""Parameter counts and FLOPs by formula against those of the model."""

import jax
import numpy as np
import pytest

from meshwright.configs.sections.model import FAMILIES, ModelConfig
from meshwright.models.decoder import initial_params
from meshwright.models.flops import flops_per_token, parameter_count
from meshwright.parallel.layout import canonical_slices
from meshwright.parallel.sharding import path_name

TINY = {"vocab": 61, "vocab_multiple": 8, "layers": 3, "embed": 16, "heads": 4, "kv_heads": 2, "head_dim": 6, "mlp": 20}
MODELS = {family: {"family": family} for family in FAMILIES} | {
    "parallel": {"parallel_block": True, "post_norms": True},
    "biases, gated": {"linear_bias": True, "qkv_bias": True, "qk_norm": True},
}


@pytest.mark.parametrize("settings", MODELS.values(), ids=MODELS)
def test_the_parameter_count_is_that_of_the_canonical_leaves(settings):
    model = ModelConfig(**TINY | settings)
    shapes = jax.eval_shape(lambda: initial_params(model, jax.random.key(0)))
    count = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes):
        whole = np.broadcast_to(np.int8(0), leaf.shape)
        count += sum(whole[index].size for _, index in canonical_slices(path_name(path), leaf.shape, model))
    assert parameter_count(model) == count


def test_flops_equal_those_of_all_products():
    """Two layers, the second with a window of 2, over 3 tokens: every product is 2 x its three dimensions."""
    model = ModelConfig(**TINY | {"layers": 2, "windows": [None, 2]})
    tokens, forward = 3, 0
    for pairs in (1 + 2 + 3, 1 + 2 + 2):
        forward += 2 * tokens * 16 * (4 * 6)  # q
        forward += 2 * (2 * tokens * 16 * (2 * 6))  # k, v
        forward += 2 * 4 * pairs * 6 + 2 * 4 * pairs * 6  # scores and sums, a head at a time, over visible pairs
        forward += 2 * tokens * (4 * 6) * 16  # o
        forward += 3 * (2 * tokens * 16 * 20)  # gate, up, down
    forward += 2 * tokens * 16 * 61  # head
    assert flops_per_token(model, tokens) == pytest.approx(3 * forward / tokens)


def test_flops_count_a_tied_head_and_no_missing_gate():
    untied, tied = (ModelConfig(**TINY, tied_embeddings=tied) for tied in (False, True))
    assert flops_per_token(untied, 8) == flops_per_token(tied, 8)
    ungated = ModelConfig(**TINY, activation="gelu")
    gate = flops_per_token(untied, 8) - flops_per_token(ungated, 8)
    assert gate == 6 * 3 * 16 * 20
