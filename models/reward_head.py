"""The head of a reward model: one number for each token, in the place of a language model's head."""

import jax
import jax.numpy as jnp
from flax import nnx


class RewardHead(nnx.Module):
    """score = hidden kernel, in float32."""

    def __init__(self, embed: int):
        self.kernel = nnx.Param(jnp.zeros((embed, 1)))

    def __call__(self, hidden: jax.Array) -> jax.Array:
        """hidden [batch, sequence, embed] -> [batch, sequence]."""
        return (hidden.astype(jnp.float32) @ self.kernel[...].astype(jnp.float32)).squeeze(-1)


def init_reward_head(embed: int, key: jax.Array) -> dict[str, jax.Array]:
    """Weights before the first step: normal with variance 1 / (embed + 1). Source: arXiv:2009.01325, appendix C."""
    return {"kernel": jax.random.normal(key, (embed, 1)) * (embed + 1) ** -0.5}
