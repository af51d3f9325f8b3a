"""Vocabulary parallelism over `tensor`: embedding lookup, logits and log-probabilities, hence the loss.

Neither the embedding table nor the logits are ever gathered. In a lookup each device adds its rows and zeros for tokens
of other devices, so [tokens, embed] crosses the link. The maximum of the logits, the sum of exponentials and the
target's logit are reductions over the vocabulary, so each device reduces its columns and three numbers a token cross.
Statistics are float32. With several chunks, logits exist for one slice of the sequence at a time, and again in the
backward pass. Source: Megatron-LM, arXiv:1909.08053, section 3.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .sharding import shard_count

Constrain = Callable[[jax.Array, tuple[str | None, ...]], jax.Array]


def embedding_lookup(table: jax.Array, tokens: jax.Array, *, constrain: Constrain) -> jax.Array:
    """Rows [batch, sequence, embed] of `table` [padded_vocab, embed] at `tokens` [batch, sequence].

    Indexing along the sharded dimension would make the partitioner gather the table and its gradient; here every shard
    is indexed by itself. Cast the rows, not the table: the gradient of a frequent token's row is a sum of thousands of
    terms, in the table's dtype.
    """
    shards = shard_count("vocab")
    if shards == 1:
        return jnp.take(constrain(table, (None, None)), tokens, axis=0)
    vocab, embed = table.shape
    size = vocab // shards
    sharded = constrain(table.reshape(shards, size, embed), ("vocab", None, None))
    local = tokens[None] - (jnp.arange(shards, dtype=tokens.dtype) * size).reshape(shards, 1, 1)
    inside = (local >= 0) & (local < size)
    local = constrain(jnp.where(inside, local, 0), ("vocab", "batch", "sequence"))
    rows = jax.vmap(lambda shard, index: shard.at[index].get(mode="promise_in_bounds"))(sharded, local)
    rows = constrain(rows, ("vocab", "batch", "sequence", None))
    return jnp.where(inside[..., None], rows, 0).sum(axis=0)


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


def target_logprobs(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """log p(targets) [..., tokens], from logits [..., tokens, padded_vocab]."""
    # Not take_along_axis: a gather along the sharded dimension would gather the logits first.
    target = jnp.where(jnp.arange(logits.shape[-1]) == targets[..., None], logits, 0).sum(axis=-1)
    return target - jax.nn.logsumexp(logits, axis=-1)


class OutputHead(NamedTuple):
    """The arrays that a model's logits are computed from."""

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
    """`function(*logits, *fields)` for every token, in as many `chunks`: [batch, sequence, ...].

    The function gets logits [..., tokens, padded_vocab] of each head and parts [..., tokens, ...] of `fields` [batch,
    sequence, ...], and returns arrays [..., tokens, ...].
    """
    shards = shard_count("batch"), shard_count("sequence")
    names = ("batch", "sequence", None, "vocab")
    # One copy of a kernel for each shard: gathered once before the loop over chunks, its gradient reduced once after
    # it. With a single kernel the partitioner does both in every chunk.
    kernels = [constrain(jnp.broadcast_to(head.kernel, (*shards, *head.kernel.shape)), names) for head in heads]

    def run_chunk(hiddens: list[jax.Array], fields: list[jax.Array]) -> Any:
        logits = []
        for hidden, head, kernel in zip(hiddens, heads, kernels, strict=True):
            hidden = constrain(hidden, ("batch", "sequence", None, None, None))
            tokens = hidden.reshape(*shards, -1, hidden.shape[-1])  # one flat product a device
            product = constrain(sharded_matmul(tokens, kernel), names)
            logits.append(cap_and_mask(product, vocab=vocab, softcap=head.softcap))
        rows = hiddens[0].shape[:-1]
        results = function(*logits, *(field.reshape(*shards, -1, *field.shape[4:]) for field in fields))
        return jax.tree.map(lambda x: x.reshape(*rows, *x.shape[3:]), results)

    split = partial(split_chunks, shards=shards, chunks=chunks)
    hiddens, parts = [split(head.hidden) for head in heads], [split(field) for field in fields]
    if chunks == 1:
        results = jax.tree.map(lambda x: x[None], run_chunk([x[0] for x in hiddens], [x[0] for x in parts]))
    else:
        results = jax.lax.map(lambda inputs: jax.checkpoint(run_chunk)(*inputs), (hiddens, parts))
    return jax.tree.map(partial(merge_chunks, shape=heads[0].hidden.shape[:2]), results)


def sharded_matmul(tokens: jax.Array, kernels: jax.Array) -> jax.Array:
    """[..., tokens, embed] x [..., embed, vocab] -> float32 [..., tokens, vocab], shard by shard."""
    if kernels.shape[:2] == (1, 1):  # XLA:CPU multiplies two matrices faster than two stacks of one matrix
        return jnp.dot(tokens[0, 0], kernels[0, 0], preferred_element_type=jnp.float32)[None, None]
    return jnp.einsum("rpte,rpev->rptv", tokens, kernels, preferred_element_type=jnp.float32)


def split_chunks(x: jax.Array, *, shards: tuple[int, int], chunks: int) -> jax.Array:
    """[batch, sequence, ...] -> [chunks, batch shard, sequence shard, rows, tokens, ...], without communication.

    Chunk i takes tokens i, i + chunks, ... of each shard, so that shards stay the major part of their dimension.
    """
    batch, sequence = x.shape[:2]
    batch_shards, sequence_shards = shards
    tokens = sequence // (sequence_shards * chunks)
    x = x.reshape(batch_shards, batch // batch_shards, sequence_shards, tokens, chunks, *x.shape[2:])
    return x.transpose(4, 0, 2, 1, 3, *range(5, x.ndim))


def merge_chunks(x: jax.Array, *, shape: tuple[int, int]) -> jax.Array:
    """The inverse of `split_chunks`: [chunks, batch shard, sequence shard, rows, tokens, ...] -> [*shape, ...]."""
    return x.transpose(1, 3, 2, 4, 0, *range(5, x.ndim)).reshape(*shape, *x.shape[5:])


def compute_logits(
    hidden: jax.Array, kernel: jax.Array, *, vocab: int, softcap: float | None, constrain: Constrain
) -> jax.Array:
    """float32 [batch, sequence, padded_vocab], sharded over the vocabulary; -inf in padding columns."""
    logits = jnp.dot(constrain(hidden, ("batch", "sequence", None)), kernel, preferred_element_type=jnp.float32)
    return cap_and_mask(constrain(logits, ("batch", "sequence", "vocab")), vocab=vocab, softcap=softcap)


def cap_and_mask(logits: jax.Array, *, vocab: int, softcap: float | None) -> jax.Array:
    """softcap * tanh(logits / softcap), and -inf from column `vocab` on."""
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    if vocab == logits.shape[-1]:
        return logits
    return jnp.where(jnp.arange(logits.shape[-1]) < vocab, logits, -jnp.inf)
