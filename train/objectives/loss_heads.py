"""Loss heads turn the last hidden states into summed loss, weight and metrics. Both gradient engines share them.

    numerator, (weight, metrics) = loss_head(decoder, hidden [rows, sequence, embed], batch, ctx, teacher)

`decoder` needs no blocks, only what follows them: its output head or reward head. The last stage of a pipeline has no
more than that. `hidden` are the states after the final norm, `teacher` the inputs of a teacher's logits or None. All
results are sums over rows, like those of recipes, so they add up over microbatches, devices and stages.
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
from .interface import RecipeLoss

LossSums = tuple[jax.Array, tuple[jax.Array, dict[str, jax.Array]]]  # numerator, (weight, metrics)
LossHead = Callable[[Decoder, jax.Array, Batch, Context, OutputHead | None], LossSums]
MakeContext = Callable[..., Context]  # (batch, keys) -> context of the blocks
TokenValues = Callable[[Decoder, jax.Array, Batch, Context], jax.Array]  # -> [rows, sequence]


def target_logprobs(model: ModelConfig, memory: MemoryConfig) -> TokenValues:
    """Per-token values: log p of each target."""

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
    """Per-token values: the score of each token, from a model with a reward head in place of its output head."""
    del batch
    return ctx.constrain(decoder.score(hidden), ("batch", "sequence"))


def make_loss_head(
    values: TokenValues, recipe: RecipeLoss, measures: Mapping[str, RecipeLoss] | None = None
) -> LossHead:
    """The loss head of a recipe over `values`, with `measures` over the same values as metrics."""

    def apply(decoder: Decoder, hidden: jax.Array, batch: Batch, ctx: Context, teacher: OutputHead | None) -> LossSums:
        del teacher
        return loss_sums(values(decoder, hidden, batch, ctx), batch, recipe, measures or {})

    return apply


def loss_sums(values: jax.Array, batch: Batch, recipe: RecipeLoss, measures: Mapping[str, RecipeLoss]) -> LossSums:
    """Apply a recipe and `measures` to per-token values [rows, sequence]."""
    numerator, weight = recipe(values, batch)
    return numerator, (weight, {name: measure(values, batch)[0] for name, measure in measures.items()})


def values_fn(values: TokenValues, graph: Any, *, context: MakeContext) -> Callable[..., jax.Array]:
    """(params, frozen, batch, keys) -> `values` of the whole model. `context(batch, keys)` is the context of blocks."""

    def apply(params: Any, frozen: Any, batch: Batch, keys: jax.Array | None) -> jax.Array:
        ctx = context(batch, keys)
        decoder = nnx.merge(graph, combine(params, frozen))
        hidden, _ = decoder.hidden(batch["tokens"], ctx)
        return values(decoder, hidden, batch, ctx)

    return apply


def make_loss(
    values: Callable[..., jax.Array],
    recipe: RecipeLoss,
    measures: Mapping[str, RecipeLoss] | None = None,
) -> Loss:
    """(params, frozen, batch, keys) -> sums of a recipe and `measures` over `values`, which `values_fn` makes."""
    return lambda params, frozen, batch, keys: loss_sums(
        values(params, frozen, batch, keys), batch, recipe, measures or {}
    )
