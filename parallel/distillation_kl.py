"""How far two models' words are apart where the vocabulary is sharded: of each token, logits in chunks.

    KL(p || q) = sum over the vocabulary of p (log p - log q)

p is what is wanted, by a model that is there (`divergence`), or by its k likeliest words, which were stored
(`divergence_from_top`): then all other words are one word, whose probability is what they have together. That is at
most the divergence of the whole vocabulary, is 0 where that is, and has no bias towards what was stored, as k words
that are scaled up to 1 have (arXiv:2503.16870, section 3). Neither model's logits are gathered: each device reduces
its own columns. A temperature divides the logits of both.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from .sharding import shard_count
from .vocabulary import Constrain, OutputHead, map_over_logits, target_logprobs

LEAST = 1e-6  # what all words that were not stored have together, at least: float32 knows less of 1 - p


class TokenDivergence(NamedTuple):
    """Two models on the same tokens; [batch, sequence] float32."""

    divergence: jax.Array  # KL(wanted || said) at the temperature
    logprobs: jax.Array  # log said(targets), at temperature 1


class TopTokens(NamedTuple):
    """The likeliest words of each token, the likeliest first; [batch, sequence, k]."""

    logprobs: jax.Array  # float32
    tokens: jax.Array  # int32


def kl_divergence(
    wanted: OutputHead,
    said: OutputHead,
    targets: jax.Array,
    *,
    temperature: float,
    vocab: int,
    chunks: int,
    constrain: Constrain,
) -> TokenDivergence:
    """How far `said` is from `wanted`. Columns at and beyond `vocab` are padding."""

    def one(wanted: jax.Array, said: jax.Array, targets: jax.Array) -> TokenDivergence:
        p, q = (jax.nn.log_softmax(scores / temperature, axis=-1) for scores in (wanted, said))
        each = jnp.where(jnp.arange(p.shape[-1]) < vocab, jnp.exp(p) * (p - q), 0)
        return TokenDivergence(each.sum(axis=-1), target_logprobs(said, targets))

    return map_over_logits(one, (wanted, said), (targets,), vocab=vocab, chunks=chunks, constrain=constrain)


def top_tokens_kl_divergence(
    wanted: TopTokens,
    said: OutputHead,
    targets: jax.Array,
    *,
    temperature: float,
    vocab: int,
    chunks: int,
    constrain: Constrain,
) -> TokenDivergence:
    """How far `said` is from the stored words `wanted`, made at the same temperature."""

    def one(said: jax.Array, targets: jax.Array, p: jax.Array, tokens: jax.Array) -> TokenDivergence:
        q = at(jax.nn.log_softmax(said / temperature, axis=-1), tokens, constrain=constrain)
        others = [jnp.maximum(1 - jnp.exp(x).sum(axis=-1), LEAST) for x in (p, q)]
        stored = (jnp.exp(p) * (p - q)).sum(axis=-1)
        return TokenDivergence(
            stored + others[0] * (jnp.log(others[0]) - jnp.log(others[1])),
            target_logprobs(said, targets),
        )

    return map_over_logits(one, (said,), (targets, *wanted), vocab=vocab, chunks=chunks, constrain=constrain)


def top_tokens(
    head: OutputHead, count: int, *, temperature: float, vocab: int, chunks: int, constrain: Constrain
) -> TopTokens:
    """The `count` likeliest words of each token."""
    one = partial(of_shards, count=count, temperature=temperature, constrain=constrain)
    return map_over_logits(one, (head,), (), vocab=vocab, chunks=chunks, constrain=constrain)


def of_shards(scores: jax.Array, *, count: int, temperature: float, constrain: Constrain) -> TopTokens:
    """The likeliest words of each shard, and of these the likeliest."""
    parts = by_shard(jax.nn.log_softmax(scores / temperature, axis=-1), constrain=constrain)
    shards, width = parts.shape[-2:]
    values, places = jax.lax.top_k(parts, min(count, width))
    words = places + (jnp.arange(shards, dtype=places.dtype) * width)[:, None]
    values, words = (x.reshape(*x.shape[:-2], -1) for x in (values, words))
    best, where = jax.lax.top_k(values, count)
    return TopTokens(best, jnp.take_along_axis(words, where, axis=-1))


def distribution_overlap(
    wanted: OutputHead, said: OutputHead, *, vocab: int, chunks: int, constrain: Constrain
) -> jax.Array:
    """sum over the vocabulary of min(p, q) [batch, sequence]: how often what `said` draws is taken for `wanted`'s.

    The acceptance rate of speculative sampling, arXiv:2211.17192, theorem 3.5.
    """

    def one(wanted: jax.Array, said: jax.Array) -> jax.Array:
        return jnp.minimum(*(jax.nn.softmax(scores, axis=-1) for scores in (wanted, said))).sum(axis=-1)

    return map_over_logits(one, (wanted, said), (), vocab=vocab, chunks=chunks, constrain=constrain)


def at(values: jax.Array, words: jax.Array, *, constrain: Constrain) -> jax.Array:
    """`values` [..., tokens, padded_vocab] of `words` [..., tokens, k]: each shard looks up its own."""
    parts = by_shard(values, constrain=constrain)
    shards, width = parts.shape[-2:]
    local = words[..., None, :] - (jnp.arange(shards, dtype=words.dtype) * width)[:, None]
    mine = (local >= 0) & (local < width)
    found = jnp.take_along_axis(parts, jnp.where(mine, local, 0), axis=-1)
    return jnp.where(mine, found, 0).sum(axis=-2)


def by_shard(values: jax.Array, *, constrain: Constrain) -> jax.Array:
    """[..., tokens, padded_vocab] -> [..., tokens, shards of the vocabulary, columns], moving nothing."""
    shards = shard_count("vocab")
    parts = values.reshape(*values.shape[:-1], shards, -1)
    return constrain(parts, ("batch", "sequence", None, "vocab", None))
