"""OFT rotates the input of a linear map, block by block, by learned rotations. Source: arXiv:2306.07280, 2311.06243.

    y = (x R) W + bias      R: blocks [block, block] on a diagonal, each I + 2 Q + 2 Q^2 + 2 Q^3 + Q^4, Q skew-symmetric

This is the series of Cayley's (I - Q)^-1 (I + Q), truncated as in PEFT: near the start R is a rotation. Leaf r
[blocks, block (block - 1) / 2] holds the entries above the diagonal of Q, row by row; `scale` [1] is one, or zero in a
layer without adapter.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from ..context import Context
from .interface import BaseLinear, InitContext, Leaves, LinearMethod


def init(key: jax.Array, kernel: jax.Array, context: InitContext) -> tuple[jax.Array, Leaves]:
    """(kernel, leaves) before the first step, where every rotation is the identity."""
    del key
    blocks = math.prod(context.inputs) // context.block
    return kernel, {"r": jnp.zeros((blocks, context.block * (context.block - 1) // 2)), "scale": context.scale}


def rotation_blocks(leaves: Leaves) -> jax.Array:
    """The blocks of R, [blocks, block, block] float32."""
    entries = leaves["r"] * leaves["scale"]
    size = math.isqrt(2 * entries.shape[1]) + 1
    rows, columns = np.triu_indices(size, 1)
    upper = jnp.zeros((len(entries), size, size)).at[:, rows, columns].set(entries)
    q = upper - upper.transpose(0, 2, 1)
    squared = q @ q
    return jnp.eye(size) + 2 * q + 2 * squared + 2 * squared @ q + squared @ squared


def apply(leaves: Leaves, x: jax.Array, base: BaseLinear, ctx: Context) -> jax.Array:
    """The adapted map of x [batch, sequence, inputs...]."""
    rotations = rotation_blocks(leaves).astype(x.dtype)
    blocks = x.reshape(*x.shape[:2], *rotations.shape[:2])
    return base.add_bias(base.multiply(jnp.einsum("bsrk,rkc->bsrc", blocks, rotations).reshape(x.shape), ctx))


def merge(leaves: Leaves, base: BaseLinear) -> BaseLinear:
    """The plain map that computes the same."""
    rotations = rotation_blocks(leaves)
    blocks = base.kernel.reshape(*rotations.shape[:2], -1)
    return base.replace(kernel=jnp.einsum("rkc,rco->rko", rotations, blocks).reshape(base.kernel.shape))


OFT = LinearMethod(initializers={"zero": init}, apply=apply, merge=merge, trained_leaves=("r",))
