"""From logits to the next token: temperature, top-k, top-p, or simply the likeliest.

    logits / temperature -> keep the k likeliest -> keep the likeliest of total probability p -> draw

Everything is a pure function of one row's logits and one row's key, so that a text never depends on the texts that
happen to be generated beside it.
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
    """How a token is drawn. Raises UserError on values that leave nothing to draw from."""

    temperature: float = 1.0
    """Divides the logits; 0: always the likeliest token."""
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
    """One token a row, int32 [rows], from float32 logits [rows, vocab] and keys [rows]."""
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return jax.vmap(jax.random.categorical)(keys, weighed(logits, sampling=sampling)).astype(jnp.int32)


def probabilities(logits: jax.Array, *, sampling: Sampling) -> jax.Array:
    """Of each token to be the one that `sample` draws: [..., vocab], from float32 logits [..., vocab]."""
    if sampling.temperature == 0:
        return jax.nn.one_hot(jnp.argmax(logits, axis=-1), logits.shape[-1])
    return jax.nn.softmax(weighed(logits, sampling=sampling), axis=-1)


def weighed(logits: jax.Array, *, sampling: Sampling) -> jax.Array:
    """The logits that are drawn from, at a temperature above 0."""
    logits = logits / sampling.temperature
    if sampling.top_k is not None:
        logits = top_k(logits, sampling.top_k)
    if sampling.top_p is not None:
        logits = top_p(logits, sampling.top_p)
    return logits


def top_k(logits: jax.Array, count: int) -> jax.Array:
    """-inf but for exactly the `count` largest of each row; of equal ones the first. Source: arXiv:1805.04833."""
    return jnp.where(ranks(logits) < count, logits, -jnp.inf)


def top_p(logits: jax.Array, mass: float) -> jax.Array:
    """-inf but for the nucleus: the fewest largest of each row whose probability is at least `mass`, one or more.

    Source: arXiv:1904.09751, section 3.1.
    """
    falling = jax.lax.sort(jax.nn.softmax(logits), dimension=-1)[..., ::-1]
    before = jnp.cumsum(falling, axis=-1) - falling  # probability of all that is likelier
    size = jnp.sum(before < mass, axis=-1, keepdims=True)
    return jnp.where(ranks(logits) < size, logits, -jnp.inf)


def ranks(logits: jax.Array) -> jax.Array:
    """Place of each element of a row, from the largest, 0, downwards; of equal ones the first is the larger."""
    return jnp.argsort(jnp.argsort(-logits, axis=-1, stable=True), axis=-1, stable=True)


def text_keys(key: jax.Array, prompts: Sequence[Sequence[int]]) -> jax.Array:
    """One key a prompt, [prompts], by what it says and how often it was said before, not by its place in the list.

    So a prompt's text is the same whatever is generated beside it, and a prompt given twice gets two texts.
    """
    said: Counter[tuple[int, ...]] = Counter()
    identities = np.zeros((len(prompts), 2), np.uint32)
    for row, prompt in enumerate(map(tuple, prompts)):
        identities[row] = zlib.crc32(np.asarray(prompt, "<u4").tobytes()), said[prompt]
        said[prompt] += 1
    one = lambda identity: jax.random.fold_in(jax.random.fold_in(key, identity[0]), identity[1])
    return jax.vmap(one)(jnp.asarray(identities))
