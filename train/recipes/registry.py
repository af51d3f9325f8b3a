"""Recipes by the name used in `recipe.name`: (token_logprobs [rows, sequence], batch) -> (numerator, weight)."""

from collections.abc import Callable

import jax

from .pretrain import next_token

Recipe = Callable[[jax.Array, dict[str, jax.Array]], tuple[jax.Array, jax.Array]]

RECIPES: dict[str, Recipe] = {"pretrain": next_token}
