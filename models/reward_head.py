"""A number for each token, from what the head of a language model reads: a reward model's, in the head's place."""

import jax
import jax.numpy as jnp
from flax import nnx


class RewardHead(nnx.Module):
    """hidden kernel, in float32."""

    def __init__(self, embed: int):
        self.kernel = nnx.Param(jnp.zeros((embed, 1)))

    def __call__(self, hidden: jax.Array) -> jax.Array:
        """hidden [batch, sequence, embed] -> [batch, sequence]."""
        return (hidden.astype(jnp.float32) @ self.kernel[...].astype(jnp.float32)).squeeze(-1)


def init_reward_head(embed: int, key: jax.Array) -> dict[str, jax.Array]:
    """The weights before the first step: normal, of variance 1 / (embed + 1). Source: arXiv:2009.01325, appendix C."""
    return {"kernel": jax.random.normal(key, (embed, 1)) * (embed + 1) ** -0.5}
