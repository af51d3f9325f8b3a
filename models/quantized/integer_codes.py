"""Integer formats: even steps from a group's smallest weight to its largest, zero included. As in GPTQ,
arXiv:2210.17323.

    weight = (code - zero) * scale
"""

import jax
import jax.numpy as jnp

from .interface import CodeFormat, Leaves


def integer_format(bits: int) -> CodeFormat:
    """The format with codes from 0 to 2^bits - 1."""
    last = 2**bits - 1

    def encode(groups: jax.Array) -> tuple[jax.Array, Leaves]:
        low, high = jnp.minimum(groups.min(axis=1), 0), jnp.maximum(groups.max(axis=1), 0)
        scale = jnp.where(high > low, (high - low) / last, 1)
        zero = jnp.round(-low / scale)
        codes = jnp.clip(jnp.round(groups / scale[:, None]) + zero[:, None], 0, last)
        return codes.astype(jnp.uint8), {"scale": scale, "zero": zero.astype(jnp.uint8)}

    def decode(codes: jax.Array, statistics: Leaves) -> jax.Array:
        steps = codes.astype(jnp.float32) - statistics["zero"][:, None].astype(jnp.float32)
        return steps * statistics["scale"][:, None]

    return CodeFormat(bits=bits, encode=encode, decode=decode)
