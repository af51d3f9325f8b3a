"""KTO: responses that are good or bad by themselves. Source: arXiv:2402.01306, equations 7 and 8.

    desirable      desirable   (1 - sigmoid(beta (r - z)))
    undesirable    undesirable (1 - sigmoid(beta (z - r)))       r: change of the response's log p since the first step

z = max(0, mean r of responses to other questions) says how far the model has moved in general; it has no gradient. The
data pair each response with one to another question, the second of the pair. The mean is over the pairs of a row, where
the authors take a microbatch, so that the loss does not depend on how the batch is split.
"""

import jax
import jax.numpy as jnp

from ...configs.sections.recipe import RecipeConfig
from .interface import Recipe, RecipeLoss
from .response_logprobs import implicit_rewards, response_logprobs, sum_by_response


def loss(config: RecipeConfig) -> RecipeLoss:
    """The loss with the weights and the `beta` of `config`."""

    def sums(token_logprobs: jax.Array, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        pair_exists = response_logprobs(token_logprobs, batch).pair_exists
        rewards = implicit_rewards(token_logprobs, batch)
        mean_other = (pair_exists * rewards[..., 1]).sum(axis=1) / jnp.maximum(pair_exists.sum(axis=1), 1)
        reference_point = jax.lax.stop_gradient(jnp.maximum(mean_other, 0))[:, None]
        desirable = sum_by_response(batch["labels"], batch["segment_ids"])[..., 0] > 0
        sign = jnp.where(desirable, 1.0, -1.0)
        weight = jnp.where(desirable, config.resolved_value("desirable"), config.resolved_value("undesirable"))
        values = weight * jax.nn.sigmoid(-sign * config.resolved_value("beta") * (rewards[..., 0] - reference_point))
        return jnp.where(pair_exists > 0, values, 0).sum(), pair_exists.sum()

    return sums


KTO = Recipe(loss, unit="answer", extra_fields=("reference_logprobs", "labels"))
