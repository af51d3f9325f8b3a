"""Sampling of the next token from logits: temperature, top-k, top-p, or greedy.

    logits / temperature -> mask all but the top k -> mask all but the nucleus of probability p -> draw

Everything is a pure function of one row's logits and one row's key, so that a text never depends on the other texts of
its batch.
"""

import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from ...configs.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn. Raises UserError on values out of range."""

    temperature: float = 1.0
    """Divides the logits; 0: always the likeliest token (greedy)."""
    top_k: int | None = None
    """Only the k likeliest tokens; None: all."""
    top_p: float | None = None
    """Only the likeliest tokens that together reach this probability (nucleus sampling); None: all."""

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise UserError(f"temperature: {self.temperature} must not be negative; 0 takes the likeliest token")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k: {self.top_k} leaves no token; use at least 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"top_p: {self.top_p} is not a probability above 0; use e.g. 0.9")


GREEDY = Sampling(temperature=0.0)


def sample(logits: jax.Array, keys: jax.Array, *, sampling: Sampling) -> jax.Array:
    """Draw one token for each row, int32 [rows], from float32 logits [rows, vocab] and keys [rows]."""
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return jax.vmap(jax.random.categorical)(keys, warp_logits(logits, sampling=sampling)).astype(jnp.int32)


def probabilities(logits: jax.Array, *, sampling: Sampling) -> jax.Array:
    """The probabilities [..., vocab] with which `sample` draws each token, from float32 logits [..., vocab]."""
    if sampling.temperature == 0:
        return jax.nn.one_hot(jnp.argmax(logits, axis=-1), logits.shape[-1])
    return jax.nn.softmax(warp_logits(logits, sampling=sampling), axis=-1)


def warp_logits(logits: jax.Array, *, sampling: Sampling) -> jax.Array:
    """Apply temperature (above 0), top-k and top-p to logits [..., vocab]."""
    logits = logits / sampling.temperature
    if sampling.top_k is not None:
        logits = top_k(logits, sampling.top_k)
    if sampling.top_p is not None:
        logits = top_p(logits, sampling.top_p)
    return logits


def top_k(logits: jax.Array, count: int) -> jax.Array:
    """Keep the `count` largest of each row, of equal ones the first; others are -inf. Source: arXiv:1805.04833."""
    return jnp.where(ranks(logits) < count, logits, -jnp.inf)


def top_p(logits: jax.Array, mass: float) -> jax.Array:
    """Keep the nucleus of each row: the fewest largest whose probability is at least `mass`; others are -inf.

    Source: arXiv:1904.09751, section 3.1.
    """
    descending = jax.lax.sort(jax.nn.softmax(logits), dimension=-1)[..., ::-1]
    before = jnp.cumsum(descending, axis=-1) - descending  # probability of all likelier tokens
    size = jnp.sum(before < mass, axis=-1, keepdims=True)
    return jnp.where(ranks(logits) < size, logits, -jnp.inf)


def ranks(logits: jax.Array) -> jax.Array:
    """The rank of each element of a row, 0 for the largest; of equal ones the first has the lower rank."""
    return jnp.argsort(jnp.argsort(-logits, axis=-1, stable=True), axis=-1, stable=True)


def prompt_keys(key: jax.Array, prompts: Sequence[Sequence[int]]) -> jax.Array:
    """Return a key for each prompt [prompts], which depends on its tokens and how often they occurred before.

    It does not depend on the index, so that a prompt's text is the same in every batch, and a repeated prompt has
    different texts.
    """
    occurrences: Counter[tuple[int, ...]] = Counter()
    identities = np.zeros((len(prompts), 2), np.uint32)
    for row, prompt in enumerate(map(tuple, prompts)):
        identities[row] = zlib.crc32(np.asarray(prompt, "<u4").tobytes()), occurrences[prompt]
        occurrences[prompt] += 1
    fold = lambda identity: jax.random.fold_in(jax.random.fold_in(key, identity[0]), identity[1])
    return jax.vmap(fold)(jnp.asarray(identities))
