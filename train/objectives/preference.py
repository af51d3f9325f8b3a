"""Recipes for pairs of answers, the better one first. Each is one function of a pair; the loss is its mean over pairs.

With r the change of an answer's log-probability since the first step, w the better answer, l the worse, and a bar for
the mean over an answer's tokens:

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
from .interface import Loss, Recipe
from .response_logprobs import Responses, implicit_rewards, response_logprobs

Batch = dict[str, jax.Array]
# (answers, r [rows, pairs, 2] or None, settings) -> [rows, pairs]
PairLoss = Callable[[Responses, jax.Array | None, RecipeConfig], jax.Array]


def dpo(answers: Responses, reward: jax.Array, config: RecipeConfig) -> jax.Array:
    """log 2 before the first step, where the rewards are 0."""
    del answers
    return -jax.nn.log_sigmoid(config.resolved_value("beta") * margin(reward))


def ipo(answers: Responses, reward: jax.Array, config: RecipeConfig) -> jax.Array:
    """1 / (4 beta^2) before the first step."""
    mean = reward / jnp.maximum(answers.tokens, 1)
    return jnp.square(margin(mean) - 1 / (2 * config.resolved_value("beta")))


def orpo(answers: Responses, reward: None, config: RecipeConfig) -> jax.Array:
    """The likelihood of the better answer, and its odds against the worse."""
    del reward
    mean = answers.mean
    return -mean[..., 0] - config.resolved_value("beta") * jax.nn.log_sigmoid(margin(log_odds(mean)))


def simpo(answers: Responses, reward: None, config: RecipeConfig) -> jax.Array:
    """No reference: an answer's own mean log-probability is its reward."""
    del reward
    return -jax.nn.log_sigmoid(config.resolved_value("beta") * margin(answers.mean) - config.resolved_value("margin"))


def margin(values: jax.Array) -> jax.Array:
    """[..., 2] -> [...]: the better answer's less the worse one's."""
    return values[..., 0] - values[..., 1]


def log_odds(mean: jax.Array) -> jax.Array:
    """log(p / (1 - p)) of p = exp(mean); an answer that is certain counts as almost certain."""
    mean = jnp.minimum(mean, -1e-6)
    return mean - jnp.log(-jnp.expm1(mean))


def pair_recipe(of_pair: PairLoss, *, reads: tuple[str, ...] = ()) -> Recipe:
    """The recipe whose loss is the mean of `of_pair`."""

    def loss(config: RecipeConfig) -> Loss:
        def sums(token_logprobs: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
            found = response_logprobs(token_logprobs, batch)
            reward = implicit_rewards(token_logprobs, batch) if reads else None
            values = of_pair(found, reward, config)
            return jnp.where(found.exists > 0, values, 0).sum(), found.exists.sum()

        return sums

    return Recipe(loss, unit="pair", reads=reads)


DPO = pair_recipe(dpo, reads=("reference_logprobs",))
IPO = pair_recipe(ipo, reads=("reference_logprobs",))
ORPO = pair_recipe(orpo)
SIMPO = pair_recipe(simpo)
