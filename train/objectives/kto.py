"""KTO: answers that are good or bad by themselves. Source: arXiv:2402.01306, equations 7 and 8.

    desirable      desirable   (1 - sigmoid(beta (r - z)))
    undesirable    undesirable (1 - sigmoid(beta (z - r)))       r: change of the answer's log p since the first step

z = max(0, mean r of answers to other questions) tells how far the model has moved at large, and has no gradient. The
data put such an answer beside each, as the second of a pair; the mean is over the pairs of a row, where the authors
take a microbatch, so that the loss does not depend on how the batch is cut.
"""

import jax
import jax.numpy as jnp

from ...configs.sections.recipe import RecipeConfig
from .interface import Loss, Recipe
from .response_logprobs import implicit_rewards, response_logprobs, sum_by_pair


def loss(config: RecipeConfig) -> Loss:
    """The loss with the weights and the `beta` of `config`."""

    def sums(token_logprobs: jax.Array, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        found = response_logprobs(token_logprobs, batch)
        reward = implicit_rewards(token_logprobs, batch)
        pairs = jnp.maximum(found.exists.sum(axis=1), 1)
        elsewhere = (found.exists * reward[..., 1]).sum(axis=1) / pairs
        moved = jax.lax.stop_gradient(jnp.maximum(elsewhere, 0))[:, None]
        good = sum_by_pair(batch["labels"], batch["segment_ids"])[..., 0] > 0
        sign = jnp.where(good, 1.0, -1.0)
        weight = jnp.where(good, config.resolved_value("desirable"), config.resolved_value("undesirable"))
        values = weight * jax.nn.sigmoid(-sign * config.resolved_value("beta") * (reward[..., 0] - moved))
        return jnp.where(found.exists > 0, values, 0).sum(), found.exists.sum()

    return sums


KTO = Recipe(loss, unit="answer", reads=("reference_logprobs", "labels"))
