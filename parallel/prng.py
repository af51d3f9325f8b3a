"""The random keys of a run: one for its initial weights, another for what is drawn in each step.

In a private run neither key reveals the other or the seed: each is a hash of all digits of the seed. `jax.random.key`
reads only 32 bits of a seed, few enough to try all of them against an adapter's initial weights, which are published
with the adapter. Whoever finds the seed this way can subtract the noise.
"""

import hashlib

import jax
import jax.numpy as jnp
import numpy as np

from ..configs.run import RunConfig


def init_key(config: RunConfig) -> jax.Array:
    """The key of the initial weights."""
    return jax.random.key(config.seed) if config.privacy is None else hashed_key(config.seed, purpose="weights")


def step_key(config: RunConfig) -> jax.Array:
    """The key that each step's key is folded from: for dropout and for noise."""
    if config.privacy is None:
        return jax.random.fold_in(jax.random.key(config.seed), 1)
    return hashed_key(config.seed, purpose="steps")


def hashed_key(seed: int, *, purpose: str) -> jax.Array:
    """A key of 64 bits that looks random to anyone without `seed`, even to one who knows the other keys."""
    digest = hashlib.sha256(f"{purpose} {seed}".encode()).digest()
    return jax.random.wrap_key_data(jnp.asarray(np.frombuffer(digest[:8], "<u4").astype(np.uint32)))
