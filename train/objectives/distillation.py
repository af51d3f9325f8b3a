"""Distillation: the loss is how far the model's token distribution is from a teacher's.

    loss = mix temperature^2 KL(teacher || model) - (1 - mix) log p(next token), a mean over the weighted tokens

The divergence is over the whole vocabulary, both distributions at `temperature`. A recipe chooses the teacher:

    lrec      the model itself before it was quantized, so that an adapter repairs it     INT2.1, arXiv:2306.08162
    distill   the model in a directory, of any size                                       arXiv:1503.02531, section 2
              or the model itself as it was before the first step, next to new data       arXiv:1606.09282

The teacher's weights are in `frozen["teacher"]`, sharded like any others, and have no gradient. Or its top tokens were
computed before training (`train/infer/precompute_logprobs.py`) and are fields of the batch; then no teacher runs.
Held-out metrics are those of the next token in any case.
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
from ..data.tokenizer import Tokenizer, check_same_tokenizer
from .loss_heads import LossHead, LossSums, MakeContext


def check_teacher(config: RunConfig, tokenizer: Tokenizer) -> None:
    """Raise UserError if the teacher is untrained, or has another tokenizer."""
    if config.recipe.teacher is not None:
        check_same_tokenizer(tokenizer, config.recipe.teacher.origin, key="recipe.teacher.from")
    elif config.recipe.name == "distill" and config.model.origin is None:
        raise UserError(
            "recipe.teacher.from: not set, and neither is model.from, so there is no trained model to learn from; set "
            "recipe.teacher.from to a Hugging Face model directory (`meshwright checkpoint export RUN DIRECTORY` makes "
            "one of a run)"
        )


def teacher_of(config: RunConfig) -> ModelConfig | None:
    """The teacher that runs next to the trained model; None if there is none, or only its top tokens are stored."""
    if not config.recipe.has_live_teacher:
        return None
    return config.model if config.recipe.teacher is None else config.recipe.teacher


def with_teacher(frozen: Any, config: RunConfig, *, initial_weights: Any, teacher_weights: Any) -> Any:
    """Add the teacher's weights to `frozen`: the model's own initial ones, or `teacher_weights` of another model.

    None for the latter gives random ones, which serve for shapes.
    """
    teacher = teacher_of(config)
    if teacher is None:
        return frozen
    weights = initial_weights if config.recipe.teacher is None else teacher_weights
    return frozen | {"teacher": init_weights(config, teacher) if weights is None else weights}


def without_teacher(frozen: Any) -> Any:
    """The frozen weights that the trained model reads."""
    return {name: part for name, part in frozen.items() if name != "teacher"} if isinstance(frozen, dict) else frozen


def init_weights(config: RunConfig, model: ModelConfig | None = None) -> Any:
    """Random weights of the run's model, or of another `model`, from the run's seed."""
    model = config.model if model is None else model
    return initial_params(model, init_key(config), jnp.dtype(config.precision.parameters))


def distillation_head(config: RunConfig) -> LossHead:
    """The loss head of distillation, from a teacher's output head or its top tokens in the batch."""
    recipe, mix, temperature = config.recipe, 1.0, 1.0
    if recipe.name == "distill":
        mix, temperature = recipe.resolved_value("mix"), recipe.resolved_value("temperature")
    divergence_of = top_tokens_kl_divergence if recipe.top_k else kl_divergence
    compare = partial(divergence_of, temperature=temperature, **vocabulary_chunks(config))

    def apply(decoder: Decoder, hidden: jax.Array, batch: Batch, ctx: Context, teacher: OutputHead | None) -> LossSums:
        if teacher is None:
            teacher = TopTokens(batch["teacher_logprobs"], batch["teacher_tokens"])
        student = output_head(decoder, hidden, config.model, ctx)
        compared = compare(teacher, student, batch["targets"], constrain=ctx.constrain)
        values = mix * temperature**2 * compared.divergence - (1 - mix) * compared.logprobs
        weights = batch["loss_weights"]
        return (weights * values).sum(), (weights.sum(), {"divergence": (weights * compared.divergence).sum()})

    return apply


def acceptance_head(config: RunConfig) -> LossHead:
    """The head of a metric: how often speculative sampling would accept the model's tokens for the teacher's."""
    overlap = partial(distribution_overlap, **vocabulary_chunks(config))

    def apply(decoder: Decoder, hidden: jax.Array, batch: Batch, ctx: Context, teacher: OutputHead | None) -> LossSums:
        rates = overlap(teacher, output_head(decoder, hidden, config.model, ctx), constrain=ctx.constrain)
        return (batch["loss_weights"] * rates).sum(), (batch["loss_weights"].sum(), {})

    return apply


def vocabulary_chunks(config: RunConfig) -> dict[str, int]:
    """Size of the vocabulary, and in how many chunks of tokens logits are computed."""
    return {"vocab": config.model.vocab, "chunks": config.memory.loss_chunks}


def loss_with_teacher(config: RunConfig, graph: Any, loss_head: LossHead, *, context: MakeContext) -> Loss:
    """(params, frozen, batch, keys) -> sums of `loss_head`, with all layers of both models on every device.

    `graph` is the graphdef of the trained model; the teacher's weights are in `frozen`.
    """
    teacher = teacher_of(config)
    teacher_graph = None if teacher is None else decoder_graphdef(teacher)

    def loss(params: Any, frozen: Any, batch: Batch, keys: jax.Array | None) -> LossSums:
        ctx = context(batch, keys)
        student = nnx.merge(graph, combine(params, without_teacher(frozen)))
        hidden, _ = student.hidden(batch["tokens"], ctx)
        head = None
        if teacher is not None:
            head = teacher_output_head(teacher_graph, teacher, frozen["teacher"], batch, ctx)
        return loss_head(student, hidden, batch, ctx, head)

    return loss


def top_k_annotator(config: RunConfig, *, context: MakeContext) -> Callable[[Any, Batch], dict[str, jax.Array]]:
    """(teacher's weights, batch) -> the teacher's `recipe.top_k` likeliest tokens, as fields of the batch."""
    teacher, graph = config.recipe.teacher, decoder_graphdef(config.recipe.teacher)
    temperature = config.recipe.resolved_value("temperature")
    top_k = partial(top_tokens, count=config.recipe.top_k, temperature=temperature, **vocabulary_chunks(config))

    def annotate(weights: Any, batch: Batch) -> dict[str, jax.Array]:
        ctx = context(batch, None)
        top = top_k(teacher_output_head(graph, teacher, weights, batch, ctx), constrain=ctx.constrain)
        return {"teacher_logprobs": top.logprobs, "teacher_tokens": top.tokens}

    return annotate


def teacher_output_head(graph: Any, teacher: ModelConfig, weights: Any, batch: Batch, ctx: Context) -> OutputHead:
    """The output head of the teacher for a batch, without gradient and without dropout."""
    decoder, ctx = nnx.merge(graph, jax.lax.stop_gradient(weights)), dataclasses.replace(ctx, dropout_keys=None)
    hidden, _ = decoder.hidden(batch["tokens"], ctx)
    return output_head(decoder, hidden, teacher, ctx)


def output_head(decoder: Decoder, hidden: jax.Array, model: ModelConfig, ctx: Context) -> OutputHead:
    """The inputs of the logits of `decoder`."""
    return OutputHead(hidden, decoder.head_kernel(ctx.compute_dtype), model.logit_softcap)
