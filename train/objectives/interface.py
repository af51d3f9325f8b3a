"""What a recipe is: a loss of the log-probabilities of a batch's targets, and what the batch must hold for it.

    numerator, weight = recipe.loss(config.recipe)(token_logprobs [rows, sequence], batch)

Both are sums over rows, so that they add up over microbatches, devices and stages however the batch was cut.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import jax

from ...configs.sections.recipe import RecipeConfig

Loss = Callable[[jax.Array, dict[str, jax.Array]], tuple[jax.Array, jax.Array]]


@dataclass(frozen=True)
class Recipe:
    """One way to learn."""

    loss: Callable[[RecipeConfig], Loss]
    unit: str  # what the weight counts: token, pair, answer
    reads: tuple[str, ...] = ()  # fields of the batch beyond BATCH_FIELDS
    scored: bool = False  # the loss is of scores [rows, sequence], by weights of its own, in place of log p
    measures: Mapping[str, Loss] = field(default_factory=dict)  # further sums of the same, with the weight of the loss
