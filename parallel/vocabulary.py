"""Log-probabilities of the targets with the vocabulary sharded over `tensor`: logits are never gathered.

The largest logit, the sum of exponentials and the target's own logit are reductions over the vocabulary dimension, so
each device reduces its columns and three numbers a token cross the link. Statistics are float32. With several chunks
logits exist for one slice of the sequence at a time and are computed again in the backward pass.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def token_logprobs(
    hidden: jax.Array,
    kernel: jax.Array,
    targets: jax.Array,
    *,
    vocab: int,
    softcap: float | None,
    chunks: int,
    constrain: Callable[[jax.Array, tuple[str | None, ...]], jax.Array],
) -> jax.Array:
    """log p(targets) [batch, sequence] float32, from hidden [batch, sequence, embed] and kernel [embed, padded_vocab].

    Columns at and beyond `vocab` are padding. `chunks` must divide each device's part of the sequence.
    """

    def one(hidden: jax.Array, targets: jax.Array) -> jax.Array:
        scores = logits(hidden, kernel, vocab=vocab, softcap=softcap, constrain=constrain)
        # Not take_along_axis: a gather along the sharded dimension would collect the logits first.
        target = jnp.where(jnp.arange(scores.shape[-1]) == targets[..., None], scores, 0).sum(axis=-1)
        return target - jax.nn.logsumexp(scores, axis=-1)

    if chunks == 1:
        return one(hidden, targets)
    # Chunk i takes tokens i, i + chunks, ...: the sharded dimension stays the major one and nothing moves.
    batch, sequence = targets.shape
    cut = [jnp.moveaxis(x.reshape(batch, sequence // chunks, chunks, *x.shape[2:]), 2, 0) for x in (hidden, targets)]
    parts = jax.lax.map(lambda pair: jax.checkpoint(one)(*pair), tuple(cut))
    return jnp.moveaxis(parts, 0, 2).reshape(batch, sequence)


def logits(
    hidden: jax.Array,
    kernel: jax.Array,
    *,
    vocab: int,
    softcap: float | None,
    constrain: Callable[[jax.Array, tuple[str | None, ...]], jax.Array],
) -> jax.Array:
    """float32 [batch, sequence, padded_vocab], sharded over the vocabulary; -inf in padding columns."""
    scores = jnp.dot(constrain(hidden, ("batch", "sequence", None)), kernel, preferred_element_type=jnp.float32)
    scores = constrain(scores, ("batch", "sequence", "vocab"))
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    if vocab == kernel.shape[-1]:
        return scores
    return jnp.where(jnp.arange(kernel.shape[-1]) < vocab, scores, -jnp.inf)
