"""What a recipe is: a loss of the log-probabilities of a batch's targets, and what the batch must hold for it.

    numerator, weight = recipe.loss(config.recipe)(token_logprobs [rows, sequence], batch)

Both are sums over rows, so that they add up over microbatches, devices and stages however the batch was cut.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax

from ...configs.names import BATCH_FIELDS
from ...configs.recipe import RecipeConfig

Loss = Callable[[jax.Array, dict[str, jax.Array]], tuple[jax.Array, jax.Array]]


@dataclass(frozen=True)
class Recipe:
    """One way to learn."""

    loss: Callable[[RecipeConfig], Loss]
    unit: str  # what the weight counts: token, pair, answer
    reads: tuple[str, ...] = ()  # fields of the batch beyond BATCH_FIELDS

    @property
    def fields(self) -> tuple[str, ...]:
        """All fields its batches have."""
        return (*BATCH_FIELDS, *self.reads)
