"""What a recipe is: a loss over per-token values of a batch, and the fields that the batch must have for it.

    numerator, weight = recipe.loss(config.recipe)(token_logprobs [rows, sequence], batch)

Both are sums over rows, so they add up over microbatches, devices and stages however the batch is split.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import jax

from ...configs.sections.recipe import RecipeConfig

RecipeLoss = Callable[[jax.Array, dict[str, jax.Array]], tuple[jax.Array, jax.Array]]


@dataclass(frozen=True)
class Recipe:
    """One training objective."""

    loss: Callable[[RecipeConfig], RecipeLoss]
    unit: str  # what the weight counts: token, pair, answer
    extra_fields: tuple[str, ...] = ()  # fields of the batch beyond BATCH_FIELDS
    uses_scores: bool = False  # the loss reads scores of a reward head [rows, sequence], not log p
    # Further metrics: sums over the same values, divided by the weight of the loss.
    measures: Mapping[str, RecipeLoss] = field(default_factory=dict)
