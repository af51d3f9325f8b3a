"""How far two models' words are apart where the vocabulary is sharded: KL divergence of each token, logits in chunks.

    KL(p || q) = sum over the vocabulary of p (log p - log q)

Neither model's logits are gathered: each device reduces its own columns.
"""

import jax
import jax.numpy as jnp

from .rules import cuts
from .vocabulary import Constrain, cut, finished, joined, product

Head = tuple[jax.Array, jax.Array]  # hidden [batch, sequence, embed], kernel [embed, padded_vocab]


def divergence(
    wanted: Head, said: Head, *, vocab: int, softcap: float | None, chunks: int, constrain: Constrain
) -> jax.Array:
    """KL(wanted || said) [batch, sequence] float32. Columns at and beyond `vocab` are padding."""
    shards = cuts("batch"), cuts("sequence")
    names = ("batch", "sequence", None, "vocab")
    kernels = [constrain(jnp.broadcast_to(kernel, (*shards, *kernel.shape)), names) for _, kernel in (wanted, said)]

    def logits(hidden: jax.Array, kernel: jax.Array) -> jax.Array:
        hidden = constrain(hidden, ("batch", "sequence", None, None, None))
        scores = product(hidden.reshape(*shards, -1, hidden.shape[-1]), kernel)
        return jax.nn.log_softmax(finished(constrain(scores, names), vocab=vocab, softcap=softcap), axis=-1)

    def one(pair: tuple[jax.Array, jax.Array]) -> jax.Array:
        p, q = (logits(hidden, kernel) for hidden, kernel in zip(pair, kernels, strict=True))
        each = jnp.where(jnp.arange(p.shape[-1]) < vocab, jnp.exp(p) * (p - q), 0)
        return each.sum(axis=-1).reshape(pair[0].shape[:-1])

    parts = tuple(cut(hidden, shards=shards, chunks=chunks) for hidden, _ in (wanted, said))
    shape = wanted[0].shape[:2]
    if chunks == 1:
        return joined(one(tuple(part[0] for part in parts))[None], shape=shape)
    return joined(jax.lax.map(jax.checkpoint(one), parts), shape=shape)
