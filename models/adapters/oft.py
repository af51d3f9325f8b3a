"""OFT: what a map reads is turned, block by block, by learned rotations. Source: arXiv:2306.07280, 2311.06243.

    y = (x R) W + bias      R: blocks [block, block] on a diagonal, each I + 2 Q + 2 Q^2 + 2 Q^3 + Q^4, Q skew-symmetric

The series is that of Cayley's (I - Q)^-1 (I + Q), cut off as PEFT does: near the start R is a rotation. Leaf r
[blocks, block (block - 1) / 2] holds what is above the diagonal of Q, row by row; `scale` [1] is one, or zero in a
layer without adapter.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from ..context import Context
from .interface import BaseLinear, InitContext, Leaves, LinearMethod


def init(key: jax.Array, kernel: jax.Array, context: InitContext) -> tuple[jax.Array, Leaves]:
    """(kernel, leaves) before the first step: nothing is turned."""
    del key
    blocks = math.prod(context.inputs) // context.block
    return kernel, {"r": jnp.zeros((blocks, context.block * (context.block - 1) // 2)), "scale": context.scale}


def rotation_blocks(leaves: Leaves) -> jax.Array:
    """R's blocks [blocks, block, block] float32."""
    above = leaves["r"] * leaves["scale"]
    size = math.isqrt(2 * above.shape[1]) + 1
    rows, columns = np.triu_indices(size, 1)
    upper = jnp.zeros((len(above), size, size)).at[:, rows, columns].set(above)
    q = upper - upper.transpose(0, 2, 1)
    squared = q @ q
    return jnp.eye(size) + 2 * q + 2 * squared + 2 * squared @ q + squared @ squared


def apply(leaves: Leaves, x: jax.Array, base: BaseLinear, ctx: Context) -> jax.Array:
    """The adapted map of x [batch, sequence, inputs...]."""
    turns = rotation_blocks(leaves).astype(x.dtype)
    parts = x.reshape(*x.shape[:2], *turns.shape[:2])
    return base.add_bias(base.multiply(jnp.einsum("bsrk,rkc->bsrc", parts, turns).reshape(x.shape), ctx))


def merge(leaves: Leaves, base: BaseLinear) -> BaseLinear:
    """The plain map that computes the same."""
    turns = rotation_blocks(leaves)
    parts = base.kernel.reshape(*turns.shape[:2], -1)
    return base.replace(kernel=jnp.einsum("rkc,rco->rko", turns, parts).reshape(base.kernel.shape))


OFT = LinearMethod(initializers={"zero": init}, apply=apply, merge=merge, trained_leaves=("r",))
