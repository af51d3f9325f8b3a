"""The divergence of two models' next-token distributions, with a sharded vocabulary and logits in chunks.

    KL(p || q) = sum over the vocabulary of p (log p - log q)

p is the teacher's distribution: computed by a model (`kl_divergence`), or stored as its k likeliest tokens
(`top_tokens_kl_divergence`). Then all other tokens count as one token that has their total probability. The result is
at most the divergence over the whole vocabulary, is 0 where that is, and has no bias towards the stored tokens, unlike
k probabilities that are rescaled to a sum of 1 (arXiv:2503.16870, section 3). Neither model's logits are gathered: each
device reduces its own columns. A temperature divides the logits of both models.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from .sharding import shard_count
from .vocabulary import Constrain, OutputHead, map_over_logits, target_logprobs

MIN_OTHER_PROBABILITY = 1e-6  # of all tokens that were not stored: below it, float32 cannot resolve 1 - p


class TokenDivergence(NamedTuple):
    """Two models compared at each position; [batch, sequence] float32."""

    divergence: jax.Array  # KL(teacher || student) at the temperature
    logprobs: jax.Array  # the student's log p(targets), at temperature 1


class TopTokens(NamedTuple):
    """The likeliest tokens at each position, the likeliest first; [batch, sequence, k]."""

    logprobs: jax.Array  # float32
    tokens: jax.Array  # int32


def kl_divergence(
    teacher: OutputHead,
    student: OutputHead,
    targets: jax.Array,
    *,
    temperature: float,
    vocab: int,
    chunks: int,
    constrain: Constrain,
) -> TokenDivergence:
    """The divergence of `student` from `teacher`. Columns at and beyond `vocab` are padding."""

    def compare(teacher: jax.Array, student: jax.Array, targets: jax.Array) -> TokenDivergence:
        p, q = (jax.nn.log_softmax(logits / temperature, axis=-1) for logits in (teacher, student))
        terms = jnp.where(jnp.arange(p.shape[-1]) < vocab, jnp.exp(p) * (p - q), 0)
        return TokenDivergence(terms.sum(axis=-1), target_logprobs(student, targets))

    return map_over_logits(compare, (teacher, student), (targets,), vocab=vocab, chunks=chunks, constrain=constrain)


def top_tokens_kl_divergence(
    teacher: TopTokens,
    student: OutputHead,
    targets: jax.Array,
    *,
    temperature: float,
    vocab: int,
    chunks: int,
    constrain: Constrain,
) -> TokenDivergence:
    """The divergence of `student` from the stored tokens of `teacher`, which have the same temperature."""

    def compare(student: jax.Array, targets: jax.Array, p: jax.Array, tokens: jax.Array) -> TokenDivergence:
        q = select_tokens(jax.nn.log_softmax(student / temperature, axis=-1), tokens, constrain=constrain)
        p_other, q_other = (jnp.maximum(1 - jnp.exp(x).sum(axis=-1), MIN_OTHER_PROBABILITY) for x in (p, q))
        stored = (jnp.exp(p) * (p - q)).sum(axis=-1)
        return TokenDivergence(
            stored + p_other * (jnp.log(p_other) - jnp.log(q_other)), target_logprobs(student, targets)
        )

    return map_over_logits(compare, (student,), (targets, *teacher), vocab=vocab, chunks=chunks, constrain=constrain)


def top_tokens(
    head: OutputHead, count: int, *, temperature: float, vocab: int, chunks: int, constrain: Constrain
) -> TopTokens:
    """The `count` likeliest tokens at each position."""
    select = partial(top_of_shards, count=count, temperature=temperature, constrain=constrain)
    return map_over_logits(select, (head,), (), vocab=vocab, chunks=chunks, constrain=constrain)


def top_of_shards(logits: jax.Array, *, count: int, temperature: float, constrain: Constrain) -> TopTokens:
    """The likeliest tokens: first of each shard of the vocabulary, then of these."""
    shards = split_vocabulary(jax.nn.log_softmax(logits / temperature, axis=-1), constrain=constrain)
    number, width = shards.shape[-2:]
    values, columns = jax.lax.top_k(shards, min(count, width))
    tokens = columns + (jnp.arange(number, dtype=columns.dtype) * width)[:, None]
    values, tokens = (x.reshape(*x.shape[:-2], -1) for x in (values, tokens))
    logprobs, index = jax.lax.top_k(values, count)
    return TopTokens(logprobs, jnp.take_along_axis(tokens, index, axis=-1))


def distribution_overlap(
    teacher: OutputHead, student: OutputHead, *, vocab: int, chunks: int, constrain: Constrain
) -> jax.Array:
    """sum over the vocabulary of min(p, q), [batch, sequence].

    With `student` as the draft model it is the acceptance rate of speculative sampling, arXiv:2211.17192, theorem 3.5.
    """

    def overlap(teacher: jax.Array, student: jax.Array) -> jax.Array:
        return jnp.minimum(*(jax.nn.softmax(logits, axis=-1) for logits in (teacher, student))).sum(axis=-1)

    return map_over_logits(overlap, (teacher, student), (), vocab=vocab, chunks=chunks, constrain=constrain)


def select_tokens(values: jax.Array, tokens: jax.Array, *, constrain: Constrain) -> jax.Array:
    """`values` [..., padded_vocab] at `tokens` [..., k]: each shard of the vocabulary looks up its own."""
    shards = split_vocabulary(values, constrain=constrain)
    number, width = shards.shape[-2:]
    local = tokens[..., None, :] - (jnp.arange(number, dtype=tokens.dtype) * width)[:, None]
    inside = (local >= 0) & (local < width)
    selected = jnp.take_along_axis(shards, jnp.where(inside, local, 0), axis=-1)
    return jnp.where(inside, selected, 0).sum(axis=-2)


def split_vocabulary(values: jax.Array, *, constrain: Constrain) -> jax.Array:
    """[..., tokens, padded_vocab] -> [..., tokens, shards of the vocabulary, columns], without communication."""
    shards = values.reshape(*values.shape[:-1], shard_count("vocab"), -1)
    return constrain(shards, ("batch", "sequence", None, "vocab", None))
