"""Recipes for pairs of responses, the chosen one first. Each is a function of a pair; the loss is its mean over pairs.

With r the change of a response's log-probability since the first step, w the chosen response, l the rejected one, and
"mean" the mean over a response's tokens:

    dpo     -log sigmoid(beta (r_w - r_l))                                         arXiv:2305.18290, equation 7
    ipo     (mean r_w - mean r_l - 1 / (2 beta))^2                                 arXiv:2310.12036, equation 17
    orpo    -mean lp_w - beta log sigmoid(odds(mean lp_w) - odds(mean lp_l))       arXiv:2403.07691, equations 4 to 7
    simpo   -log sigmoid(beta (mean lp_w - mean lp_l) - margin)                    arXiv:2405.14734, equation 6

ipo takes means over tokens, as its authors advise for texts and TRL does.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from ...configs.sections.recipe import RecipeConfig
from .interface import Recipe, RecipeLoss
from .response_logprobs import ResponsePairs, implicit_rewards, response_logprobs

Batch = dict[str, jax.Array]
# (responses, implicit rewards [rows, pairs, 2] or None, settings) -> [rows, pairs]
PairLoss = Callable[[ResponsePairs, jax.Array | None, RecipeConfig], jax.Array]


def dpo(responses: ResponsePairs, rewards: jax.Array, config: RecipeConfig) -> jax.Array:
    """log 2 before the first step, where the rewards are 0."""
    del responses
    return -jax.nn.log_sigmoid(config.resolved_value("beta") * margin(rewards))


def ipo(responses: ResponsePairs, rewards: jax.Array, config: RecipeConfig) -> jax.Array:
    """1 / (4 beta^2) before the first step."""
    mean_rewards = rewards / jnp.maximum(responses.tokens, 1)
    return jnp.square(margin(mean_rewards) - 1 / (2 * config.resolved_value("beta")))


def orpo(responses: ResponsePairs, rewards: None, config: RecipeConfig) -> jax.Array:
    """The likelihood of the chosen response, and its odds against the rejected one."""
    del rewards
    mean = responses.mean_logprobs
    return -mean[..., 0] - config.resolved_value("beta") * jax.nn.log_sigmoid(margin(log_odds(mean)))


def simpo(responses: ResponsePairs, rewards: None, config: RecipeConfig) -> jax.Array:
    """Without a reference: the reward of a response is its own mean log-probability."""
    del rewards
    beta, target_margin = config.resolved_value("beta"), config.resolved_value("margin")
    return -jax.nn.log_sigmoid(beta * margin(responses.mean_logprobs) - target_margin)


def margin(values: jax.Array) -> jax.Array:
    """[..., 2] -> [...]: the chosen response's value minus the rejected one's."""
    return values[..., 0] - values[..., 1]


def log_odds(mean: jax.Array) -> jax.Array:
    """log(p / (1 - p)) of p = exp(mean); p = 1 counts as almost 1, so that the result is finite."""
    mean = jnp.minimum(mean, -1e-6)
    return mean - jnp.log(-jnp.expm1(mean))


def pair_recipe(pair_loss: PairLoss, *, extra_fields: tuple[str, ...] = ()) -> Recipe:
    """The recipe whose loss is the mean of `pair_loss`, which gets rewards if the batch has a reference."""

    def loss(config: RecipeConfig) -> RecipeLoss:
        def sums(token_logprobs: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
            responses = response_logprobs(token_logprobs, batch)
            rewards = implicit_rewards(token_logprobs, batch) if extra_fields else None
            values = pair_loss(responses, rewards, config)
            return jnp.where(responses.pair_exists > 0, values, 0).sum(), responses.pair_exists.sum()

        return sums

    return Recipe(loss, unit="pair", extra_fields=extra_fields)


DPO = pair_recipe(dpo, extra_fields=("reference_logprobs",))
IPO = pair_recipe(ipo, extra_fields=("reference_logprobs",))
ORPO = pair_recipe(orpo)
SIMPO = pair_recipe(simpo)
