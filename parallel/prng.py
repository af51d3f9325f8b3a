"""Where all chance of a run begins: one key for the weights before step 0, another for what is drawn in each step.

Of a private run neither tells of the other, nor of the seed: each is a hash of all its digits. `jax.random.key` reads
32 bits of a seed, few enough to try them all against the weights an adapter begins with, which go wherever it goes; who
found them so could take the noise away.
"""

import hashlib

import jax
import jax.numpy as jnp
import numpy as np

from ..configs.run import RunConfig


def init_key(config: RunConfig) -> jax.Array:
    """The key of the weights before step 0."""
    return jax.random.key(config.seed) if config.privacy is None else hashed(config.seed, purpose="weights")


def step_key(config: RunConfig) -> jax.Array:
    """The key from which each step makes its own: of dropout and of noise."""
    if config.privacy is None:
        return jax.random.fold_in(jax.random.key(config.seed), 1)
    return hashed(config.seed, purpose="steps")


def hashed(seed: int, *, purpose: str) -> jax.Array:
    """A key of 64 bits that cannot be told from chance by who does not know `seed`, whatever other keys he knows."""
    digest = hashlib.sha256(f"{purpose} {seed}".encode()).digest()
    return jax.random.wrap_key_data(jnp.asarray(np.frombuffer(digest[:8], "<u4").astype(np.uint32)))
