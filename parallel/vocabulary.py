"""The two ends of a model whose vocabulary is sharded over `tensor`: rows of the table, and log-probabilities.

Neither the table nor the logits are ever gathered. A lookup takes what it has of every token's row and adds zeros for
the rest, so [tokens, embed] crosses the link. Of the logits, the largest, the sum of exponentials and the target's own
are reductions over the vocabulary, so each device reduces its columns and three numbers a token cross. Statistics are
float32. With several chunks logits exist for one slice of the sequence at a time, and again in the backward pass.
Source: Megatron-LM, arXiv:1909.08053, section 3.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .sharding import shard_count

Constrain = Callable[[jax.Array, tuple[str | None, ...]], jax.Array]


def embedding_lookup(table: jax.Array, tokens: jax.Array, *, constrain: Constrain) -> jax.Array:
    """Rows [batch, sequence, embed] of `table` [padded_vocab, embed] at `tokens` [batch, sequence].

    Indexing along the sharded dimension would make the partitioner collect the table, and all of its gradient; here
    every shard is indexed by itself. Cast the rows, not the table: the gradient of a frequent token's row is a sum of
    thousands of terms, in the table's dtype.
    """
    shards = shard_count("vocab")
    if shards == 1:
        return jnp.take(constrain(table, (None, None)), tokens, axis=0)
    vocab, embed = table.shape
    rows = vocab // shards
    cut = constrain(table.reshape(shards, rows, embed), ("vocab", None, None))
    local = tokens[None] - (jnp.arange(shards, dtype=tokens.dtype) * rows).reshape(shards, 1, 1)
    mine = (local >= 0) & (local < rows)
    local = constrain(jnp.where(mine, local, 0), ("vocab", "batch", "sequence"))
    found = jax.vmap(lambda part, index: part.at[index].get(mode="promise_in_bounds"))(cut, local)
    found = constrain(found, ("vocab", "batch", "sequence", None))
    return jnp.where(mine[..., None], found, 0).sum(axis=0)


def token_logprobs(
    hidden: jax.Array,
    kernel: jax.Array,
    targets: jax.Array,
    *,
    vocab: int,
    softcap: float | None,
    chunks: int,
    constrain: Constrain,
) -> jax.Array:
    """log p(targets) [batch, sequence] float32, from hidden [batch, sequence, embed] and kernel [embed, padded_vocab].

    Columns at and beyond `vocab` are padding. `chunks` must divide each device's part of the sequence.
    """
    head = OutputHead(hidden, kernel, softcap)
    return map_over_logits(target_logprobs, (head,), (targets,), vocab=vocab, chunks=chunks, constrain=constrain)


def target_logprobs(scores: jax.Array, targets: jax.Array) -> jax.Array:
    """log p(targets) [..., tokens], from scores [..., tokens, padded_vocab]."""
    # Not take_along_axis: a gather along the sharded dimension would collect the logits first.
    target = jnp.where(jnp.arange(scores.shape[-1]) == targets[..., None], scores, 0).sum(axis=-1)
    return target - jax.nn.logsumexp(scores, axis=-1)


class OutputHead(NamedTuple):
    """What a model's logits are made of."""

    hidden: jax.Array  # [batch, sequence, embed]
    kernel: jax.Array  # [embed, padded_vocab]
    softcap: float | None = None


def map_over_logits(
    function: Callable[..., Any],
    heads: Sequence[OutputHead],
    fields: Sequence[jax.Array],
    *,
    vocab: int,
    chunks: int,
    constrain: Constrain,
) -> Any:
    """`function(*scores, *fields)` of every token, in as many `chunks`: [batch, sequence, ...].

    It is given scores [..., tokens, padded_vocab] of each head and parts [..., tokens, ...] of `fields` [batch,
    sequence, ...], and gives arrays [..., tokens, ...].
    """
    shards = shard_count("batch"), shard_count("sequence")
    names = ("batch", "sequence", None, "vocab")
    # One copy of a kernel a shard: gathered once before the loop over chunks, its gradient reduced once after it.
    # With a single kernel the partitioner does both in every chunk.
    kernels = [constrain(jnp.broadcast_to(head.kernel, (*shards, *head.kernel.shape)), names) for head in heads]

    def one(hiddens: list[jax.Array], fields: list[jax.Array]) -> Any:
        scores = []
        for hidden, head, copies in zip(hiddens, heads, kernels, strict=True):
            hidden = constrain(hidden, ("batch", "sequence", None, None, None))
            tokens = hidden.reshape(*shards, -1, hidden.shape[-1])  # one flat product a device
            scores.append(cap_and_mask(constrain(product(tokens, copies), names), vocab=vocab, softcap=head.softcap))
        rows = hiddens[0].shape[:-1]
        found = function(*scores, *(field.reshape(*shards, -1, *field.shape[4:]) for field in fields))
        return jax.tree.map(lambda x: x.reshape(*rows, *x.shape[3:]), found)

    parts = [[cut(x, shards=shards, chunks=chunks) for x in some] for some in ([h.hidden for h in heads], fields)]
    shape = heads[0].hidden.shape[:2]
    if chunks == 1:
        found = jax.tree.map(lambda x: x[None], one(*([part[0] for part in some] for some in parts)))
    else:
        found = jax.lax.map(lambda pair: jax.checkpoint(one)(*pair), tuple(parts))
    return jax.tree.map(lambda x: joined(x, shape=shape), found)


def product(tokens: jax.Array, copies: jax.Array) -> jax.Array:
    """[..., tokens, embed] x [..., embed, vocab] -> float32 [..., tokens, vocab], shard by shard."""
    if copies.shape[:2] == (1, 1):  # XLA:CPU multiplies two matrices faster than two stacks of one matrix
        return jnp.dot(tokens[0, 0], copies[0, 0], preferred_element_type=jnp.float32)[None, None]
    return jnp.einsum("rpte,rpev->rptv", tokens, copies, preferred_element_type=jnp.float32)


def cut(x: jax.Array, *, shards: tuple[int, int], chunks: int) -> jax.Array:
    """[batch, sequence, ...] -> [chunks, batch shard, sequence shard, rows, tokens, ...], moving nothing.

    Chunk i takes tokens i, i + chunks, ... of each shard: what is sharded stays the major part of its dimension.
    """
    batch, sequence = x.shape[:2]
    rows, pieces = shards
    x = x.reshape(rows, batch // rows, pieces, sequence // (pieces * chunks), chunks, *x.shape[2:])
    return x.transpose(4, 0, 2, 1, 3, *range(5, x.ndim))


def joined(parts: jax.Array, *, shape: tuple[int, int]) -> jax.Array:
    """The inverse of `cut`: parts [chunks, batch shard, sequence shard, rows, tokens, ...] -> [*shape, ...]."""
    return parts.transpose(1, 3, 2, 4, 0, *range(5, parts.ndim)).reshape(*shape, *parts.shape[5:])


def compute_logits(
    hidden: jax.Array, kernel: jax.Array, *, vocab: int, softcap: float | None, constrain: Constrain
) -> jax.Array:
    """float32 [batch, sequence, padded_vocab], sharded over the vocabulary; -inf in padding columns."""
    scores = jnp.dot(constrain(hidden, ("batch", "sequence", None)), kernel, preferred_element_type=jnp.float32)
    return cap_and_mask(constrain(scores, ("batch", "sequence", "vocab")), vocab=vocab, softcap=softcap)


def cap_and_mask(scores: jax.Array, *, vocab: int, softcap: float | None) -> jax.Array:
    """softcap * tanh(scores / softcap), and -inf from column `vocab` on."""
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    if vocab == scores.shape[-1]:
        return scores
    return jnp.where(jnp.arange(scores.shape[-1]) < vocab, scores, -jnp.inf)
