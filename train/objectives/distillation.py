"""Learning what another model says: a teacher, and how far from its words the model's own are.

    loss = mix temperature^2 KL(teacher || model) - (1 - mix) log p(next token), a mean over the tokens that count

The divergence is between all words either might say next, both at `temperature`. A recipe chooses who teaches:

    lrec      the model itself, before it was quantized, so that an adapter repairs it    INT2.1, arXiv:2306.08162
    distill   the model in a directory, of any size                                       arXiv:1503.02531, section 2
              or itself, as it was before the first step, beside new data                 arXiv:1606.09282

A teacher's weights are in `frozen["teacher"]`, sharded like any, and have no gradient. Or its likeliest words were
noted before training (`reference.py`) and are fields of the batch; then it is gone. Held-out numbers are those of the
next token in any case.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ...configs.errors import UserError
from ...configs.run import RunConfig
from ...configs.sections.model import ModelConfig
from ...configs.sections.recipe import RecipeConfig
from ...models.context import Context
from ...models.decoder import Decoder, decoder_graphdef, initial_params
from ...parallel.distillation_kl import (
    TopTokens,
    distribution_overlap,
    kl_divergence,
    top_tokens,
    top_tokens_kl_divergence,
)
from ...parallel.gradients import Batch, Loss
from ...parallel.prng import init_key
from ...parallel.state import combine
from ...parallel.vocabulary import OutputHead
from ..data.tokenizer import Tokenizer, check_same
from .loss_heads import LossAndMetrics, LossHead

Told = Callable[..., Context]  # (batch, keys) -> what the blocks are told


def check_teacher(config: RunConfig, tokenizer: Tokenizer) -> None:
    """Raise UserError where the teacher has learned nothing, or names its words otherwise than `tokenizer`."""
    if config.recipe.teacher is not None:
        check_same(tokenizer, config.recipe.teacher.origin, key="recipe.teacher.from")
    elif config.recipe.name == "distill" and config.model.origin is None:
        raise UserError(
            "recipe.teacher.from: not set, and nor is model.from: nobody here has learned anything to teach; set it to "
            "a Hugging Face model directory (of a run of yours: `meshwright checkpoint export RUN DIRECTORY`)"
        )


def teacher_of(config: RunConfig) -> ModelConfig | None:
    """The model that stands beside the one that is trained; None where there is none."""
    if not config.recipe.has_live_teacher:
        return None
    return config.model if config.recipe.teacher is None else config.recipe.teacher


def with_teacher(frozen: Any, config: RunConfig, *, own: Any, given: Any) -> Any:
    """`frozen`, and the teacher's weights where there is one: those `given`, or the model's `own` as they began."""
    teacher = teacher_of(config)
    if teacher is None:
        return frozen
    weights = own if config.recipe.teacher is None else given
    return frozen | {"teacher": init_weights(teacher, config) if weights is None else weights}


def without_teacher(frozen: Any) -> Any:
    """What the model that is trained reads."""
    return {name: part for name, part in frozen.items() if name != "teacher"} if isinstance(frozen, dict) else frozen


def init_weights(model: ModelConfig, config: RunConfig) -> Any:
    """Random weights of `model`, by the seed."""
    return initial_params(model, init_key(config), jnp.dtype(config.precision.parameters))


def distillation_head(config: RunConfig) -> LossHead:
    """How far the model is from what a teacher says, who stands beside it or whose words are in the batch."""
    recipe, words = config.recipe, vocabulary_chunks(config)
    mix, temperature = (
        recipe.resolved_value(key) if recipe.name == "distill" else 1.0 for key in ("mix", "temperature")
    )
    compare = partial(top_tokens_kl_divergence if recipe.top_k else kl_divergence, temperature=temperature, **words)

    def ended(
        decoder: Decoder, hidden: jax.Array, batch: Batch, ctx: Context, teacher: OutputHead | None
    ) -> LossAndMetrics:
        wanted = TopTokens(batch["teacher_logprobs"], batch["teacher_tokens"]) if teacher is None else teacher
        said = logit_inputs(decoder, hidden, config.model, ctx)
        apart = compare(wanted, said, batch["targets"], constrain=ctx.constrain)
        values = mix * temperature**2 * apart.divergence - (1 - mix) * apart.logprobs
        weights = batch["loss_weights"]
        return (weights * values).sum(), (weights.sum(), {"divergence": (weights * apart.divergence).sum()})

    return ended


def acceptance_head(config: RunConfig) -> LossHead:
    """Sums of how often what the model draws is taken for the teacher's, and of weights."""
    words = vocabulary_chunks(config)

    def ended(
        decoder: Decoder, hidden: jax.Array, batch: Batch, ctx: Context, teacher: OutputHead | None
    ) -> LossAndMetrics:
        each = distribution_overlap(
            teacher, logit_inputs(decoder, hidden, config.model, ctx), constrain=ctx.constrain, **words
        )
        return (batch["loss_weights"] * each).sum(), (batch["loss_weights"].sum(), {})

    return ended


def vocabulary_chunks(config: RunConfig) -> dict[str, int]:
    """What says how two models' words are compared."""
    return {"vocab": config.model.vocab, "chunks": config.memory.loss_chunks}


def loss_with_teacher(config: RunConfig, structure: Any, ending: LossHead, *, context: Told) -> Loss:
    """`ending` of a batch, by parameters, where all layers of both models are at hand; the teacher is in `frozen`.

    `structure` is that of the model that learns.
    """
    teacher = teacher_of(config)
    whole = None if teacher is None else decoder_graphdef(teacher)

    def loss(params: Any, frozen: Any, batch: Batch, keys: jax.Array | None) -> LossAndMetrics:
        ctx = context(batch, keys)
        student = nnx.merge(structure, combine(params, without_teacher(frozen)))
        hidden, _ = student.hidden(batch["tokens"], ctx)
        wanted = None if teacher is None else teacher_logit_inputs(whole, teacher, frozen["teacher"], batch, ctx)
        return ending(student, hidden, batch, ctx, wanted)

    return loss


def top_k_annotator(config: RunConfig, *, context: Told) -> Callable[[Any, Batch], dict[str, jax.Array]]:
    """(the teacher's weights, batch) -> its likeliest words of each token, by field of the batch."""
    recipe: RecipeConfig = config.recipe
    whole = decoder_graphdef(recipe.teacher)
    words = partial(
        top_tokens, count=recipe.top_k, temperature=recipe.resolved_value("temperature"), **vocabulary_chunks(config)
    )

    def note(weights: Any, batch: Batch) -> dict[str, jax.Array]:
        ctx = context(batch, None)
        found = words(teacher_logit_inputs(whole, recipe.teacher, weights, batch, ctx), constrain=ctx.constrain)
        return {"teacher_logprobs": found.logprobs, "teacher_tokens": found.tokens}

    return note


def teacher_logit_inputs(whole: Any, teacher: ModelConfig, weights: Any, batch: Batch, ctx: Context) -> OutputHead:
    """What the logits of the teacher with `weights` are made of; nothing of it is random."""
    decoder, ctx = nnx.merge(whole, jax.lax.stop_gradient(weights)), dataclasses.replace(ctx, dropout_keys=None)
    hidden, _ = decoder.hidden(batch["tokens"], ctx)
    return logit_inputs(decoder, hidden, teacher, ctx)


def logit_inputs(decoder: Decoder, hidden: jax.Array, model: ModelConfig, ctx: Context) -> OutputHead:
    """What the logits of `decoder` are made of."""
    return OutputHead(hidden, decoder.head_kernel(ctx.compute_dtype), model.logit_softcap)
