"""What is made of a model's last hidden states: an ending, wherever the layers are that made them.

    numerator, (weight, metrics) = ending(decoder, hidden [rows, sequence, embed], batch, ctx, teacher)

`decoder` gives what stands behind its blocks, a head or a score; a pipeline's last stage has no more of it. `hidden` is
behind the final norm. `teacher` is what the logits of a model beside it are made of; None where there is none. All are
sums over rows, as recipes are, so an ending adds up over microbatches, devices and stages.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import nnx

from ...configs.sections.model import ModelConfig
from ...configs.sections.parallel import MemoryConfig
from ...models.context import Context
from ...models.decoder import Decoder
from ...parallel.gradients import Batch, Loss
from ...parallel.state import combine
from ...parallel.vocabulary import OutputHead, token_logprobs
from . import interface as recipes

LossAndMetrics = tuple[jax.Array, tuple[jax.Array, dict[str, jax.Array]]]
LossHead = Callable[[Decoder, jax.Array, Batch, Context, OutputHead | None], LossAndMetrics]
TokenValues = Callable[[Decoder, jax.Array, Batch, Context], jax.Array]  # a number for each token [rows, sequence]


def target_logprobs(model: ModelConfig, memory: MemoryConfig) -> TokenValues:
    """log p of each target."""

    def values(decoder: Decoder, hidden: jax.Array, batch: Batch, ctx: Context) -> jax.Array:
        return token_logprobs(
            hidden,
            decoder.head_kernel(ctx.compute_dtype),
            batch["targets"],
            vocab=model.vocab,
            softcap=model.logit_softcap,
            chunks=memory.loss_chunks,
            constrain=ctx.constrain,
        )

    return values


def reward_scores(decoder: Decoder, hidden: jax.Array, batch: Batch, ctx: Context) -> jax.Array:
    """The score of each token, of a model that has one in the head's place."""
    del batch
    return ctx.constrain(decoder.score(hidden), ("batch", "sequence"))


def make_loss_head(
    values: TokenValues, recipe: recipes.Loss, measures: Mapping[str, recipes.Loss] | None = None
) -> LossHead:
    """The recipe's loss of `values`, and `measures` of the same."""
    summed = sums(recipe, measures or {})

    def ended(
        decoder: Decoder, hidden: jax.Array, batch: Batch, ctx: Context, teacher: OutputHead | None
    ) -> LossAndMetrics:
        del teacher
        return summed(values(decoder, hidden, batch, ctx), batch)

    return ended


def sums(recipe: recipes.Loss, measures: Mapping[str, recipes.Loss]) -> Callable[[jax.Array, Batch], LossAndMetrics]:
    """What a recipe and `measures` add up to, of a number for each token."""

    def summed(found: jax.Array, batch: Batch) -> LossAndMetrics:
        numerator, weight = recipe(found, batch)
        return numerator, (weight, {name: measure(found, batch)[0] for name, measure in measures.items()})

    return summed


def values_fn(values: TokenValues, graph: Any, *, context: Callable[..., Context]) -> Callable[..., jax.Array]:
    """(params, frozen, batch, keys) -> `values` of the whole model. `context(batch, keys)` is what blocks are told."""

    def found(params: Any, frozen: Any, batch: Batch, keys: jax.Array | None) -> jax.Array:
        ctx = context(batch, keys)
        decoder = nnx.merge(graph, combine(params, frozen))
        hidden, _ = decoder.hidden(batch["tokens"], ctx)
        return values(decoder, hidden, batch, ctx)

    return found


def make_loss(
    values: Callable[..., jax.Array], recipe: recipes.Loss, measures: Mapping[str, recipes.Loss] | None = None
) -> Loss:
    """The recipe's numerator and weight of a batch, by parameters; `values` as `by_parameters` gives them."""
    summed = sums(recipe, measures or {})
    return lambda params, frozen, batch, keys: summed(values(params, frozen, batch, keys), batch)
