"""Recipes, one battery over the registry: sums add up over any cut of the batch, weightless tokens do nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from equivalence import packed
from meshwright.train.recipes.registry import RECIPES


@pytest.fixture
def batch():
    return {name: jnp.asarray(field) for name, field in packed(np.random.default_rng(0), (6, 12), vocab=9).items()}


@pytest.fixture
def logprobs():
    return -jax.random.uniform(jax.random.key(0), (6, 12)) - 0.1


@pytest.mark.parametrize("name", RECIPES)
def test_sums_add_up_over_any_cut_of_the_batch(name, batch, logprobs):
    whole = RECIPES[name](logprobs, batch)
    parts = [
        RECIPES[name](logprobs[cut], jax.tree.map(lambda x, cut=cut: x[cut], batch)) for cut in (slice(2), slice(2, 6))
    ]
    np.testing.assert_allclose(np.sum(parts, axis=0), whole, rtol=1e-6)


@pytest.mark.parametrize("name", RECIPES)
def test_a_token_without_weight_has_no_effect(name, batch, logprobs):
    changed = jnp.where(batch["loss_weights"] > 0, logprobs, -7.0)
    np.testing.assert_array_equal(RECIPES[name](changed, batch), RECIPES[name](logprobs, batch))


def test_pretraining_is_the_weighted_negative_log_likelihood(batch, logprobs):
    numerator, weight = RECIPES["pretrain"](logprobs, batch)
    weights = np.asarray(batch["loss_weights"])
    np.testing.assert_allclose(numerator, (weights * -np.asarray(logprobs)).sum(), rtol=1e-6)
    assert weight == weights.sum()
