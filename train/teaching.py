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

from ..configs.errors import UserError
from ..configs.model import ModelConfig
from ..configs.recipe import RecipeConfig
from ..configs.run import RunConfig
from ..models.context import Context
from ..models.decoder import Decoder, graph, initial_params
from ..parallel.divergence import Apart, Top, divergence, divergence_from_top, likeliest, overlap
from ..parallel.state import combine
from ..parallel.vocabulary import Head
from .data.tokenizer import Tokenizer, check_same
from .gradients import Batch, Loss
from .keys import of_weights

Told = Callable[..., Context]  # (batch, keys) -> what the blocks are told
Compare = Callable[[Head, Any, Batch, Context], Apart]  # (the model's head, frozen, batch, context)


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
    if not config.recipe.two_models:
        return None
    return config.model if config.recipe.teacher is None else config.recipe.teacher


def with_teacher(frozen: Any, config: RunConfig, *, own: Any, given: Any) -> Any:
    """`frozen`, and the teacher's weights where there is one: those `given`, or the model's `own` as they began."""
    teacher = teacher_of(config)
    if teacher is None:
        return frozen
    weights = own if config.recipe.teacher is None else given
    return frozen | {"teacher": fresh_weights(teacher, config) if weights is None else weights}


def without_teacher(frozen: Any) -> Any:
    """What the model that is trained reads."""
    return {name: part for name, part in frozen.items() if name != "teacher"} if isinstance(frozen, dict) else frozen


def fresh_weights(model: ModelConfig, config: RunConfig) -> Any:
    """Random weights of `model`, by the seed."""
    return initial_params(model, of_weights(config), jnp.dtype(config.precision.parameters))


def taught_loss(config: RunConfig, structure: Any, *, told: Told) -> Loss:
    """Numerator and weight of a batch; `structure` is that of the model that learns."""
    recipe = config.recipe
    mix, temperature = (recipe.number(key) if recipe.name == "distill" else 1.0 for key in ("mix", "temperature"))
    words = {"temperature": temperature, "vocab": config.model.vocab, "chunks": config.memory.loss_chunks}
    compare = with_noted(**words) if recipe.top_k else with_present(teacher_of(config), **words)

    def loss(
        params: Any, frozen: Any, batch: Batch, keys: jax.Array | None
    ) -> tuple[jax.Array, tuple[jax.Array, dict]]:
        ctx = told(batch, keys)
        student = nnx.merge(structure, combine(params, without_teacher(frozen)))
        apart = compare(head(student, config.model, batch, ctx), frozen, batch, ctx)
        values = mix * temperature**2 * apart.divergence - (1 - mix) * apart.logprobs
        weights = batch["loss_weights"]
        return (weights * values).sum(), (weights.sum(), {"divergence": (weights * apart.divergence).sum()})

    return loss


def with_present(teacher: ModelConfig, **words: Any) -> Compare:
    """Compares with the teacher in `frozen`."""
    whole = graph(teacher)

    def compare(said: Head, frozen: Any, batch: Batch, ctx: Context) -> Apart:
        wanted = teachers_head(whole, teacher, frozen, batch, ctx)
        return divergence(wanted, said, batch["targets"], constrain=ctx.constrain, **words)

    return compare


def with_noted(**words: Any) -> Compare:
    """Compares with the likeliest words in the batch."""

    def compare(said: Head, frozen: Any, batch: Batch, ctx: Context) -> Apart:
        del frozen
        wanted = Top(batch["teacher_logprobs"], batch["teacher_tokens"])
        return divergence_from_top(wanted, said, batch["targets"], constrain=ctx.constrain, **words)

    return compare


def acceptance(
    config: RunConfig, structure: Any, *, told: Told
) -> Callable[[Any, Any, Batch], tuple[jax.Array, jax.Array]]:
    """(params, frozen, batch) -> sums of how often what the model draws is taken for the teacher's, and of weights."""
    teacher = teacher_of(config)
    whole = graph(teacher)

    def taken(params: Any, frozen: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        ctx = told(batch, None)
        student = nnx.merge(structure, combine(params, without_teacher(frozen)))
        each = overlap(
            teachers_head(whole, teacher, frozen, batch, ctx),
            head(student, config.model, batch, ctx),
            vocab=config.model.vocab,
            chunks=config.memory.loss_chunks,
            constrain=ctx.constrain,
        )
        return (batch["loss_weights"] * each).sum(), batch["loss_weights"].sum()

    return taken


def noted_words(config: RunConfig, *, told: Told) -> Callable[[Any, Batch], dict[str, jax.Array]]:
    """(the teacher's weights, batch) -> its likeliest words of each token, by field of the batch."""
    recipe: RecipeConfig = config.recipe
    whole = graph(recipe.teacher)
    words = partial(
        likeliest,
        count=recipe.top_k,
        temperature=recipe.number("temperature"),
        vocab=config.model.vocab,
        chunks=config.memory.loss_chunks,
    )

    def note(weights: Any, batch: Batch) -> dict[str, jax.Array]:
        ctx = told(batch, None)
        found = words(teachers_head(whole, recipe.teacher, {"teacher": weights}, batch, ctx), constrain=ctx.constrain)
        return {"teacher_logprobs": found.logprobs, "teacher_tokens": found.tokens}

    return note


def teachers_head(whole: Any, teacher: ModelConfig, frozen: Any, batch: Batch, ctx: Context) -> Head:
    """What the logits of the teacher in `frozen` are made of; nothing of it is random."""
    decoder = nnx.merge(whole, jax.lax.stop_gradient(frozen["teacher"]))
    return head(decoder, teacher, batch, dataclasses.replace(ctx, dropout_keys=None))


def head(decoder: Decoder, model: ModelConfig, batch: Batch, ctx: Context) -> Head:
    """What the logits of `decoder` are made of."""
    hidden, _ = decoder.hidden(batch["tokens"], ctx)
    return Head(hidden, decoder.head_kernel(ctx.compute), model.logit_softcap)
