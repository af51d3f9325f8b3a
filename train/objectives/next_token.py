"""The next token: of every document (pretrain), or of what is to be said (sft); weights of the data tell them apart."""

import jax

from ...configs.sections.recipe import RecipeConfig
from .interface import Loss, Recipe


def next_token(token_logprobs: jax.Array, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """sum(weight * -log p) and sum(weight), from log p of each target [rows, sequence]."""
    weights = batch["loss_weights"]
    return -(weights * token_logprobs).sum(), weights.sum()


def loss(config: RecipeConfig) -> Loss:
    """There is nothing to set."""
    del config
    return next_token


NEXT_TOKEN = Recipe(loss, unit="token")
