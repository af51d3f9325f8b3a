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
from .interface import Inside, Leaves, Method, Setting


def start(key: jax.Array, kernel: jax.Array, setting: Setting) -> tuple[jax.Array, Leaves]:
    """(kernel, leaves) before the first step: nothing is turned."""
    del key
    blocks = math.prod(setting.inputs) // setting.block
    return kernel, {"r": jnp.zeros((blocks, setting.block * (setting.block - 1) // 2)), "scale": setting.scale}


def rotations(leaves: Leaves) -> jax.Array:
    """R's blocks [blocks, block, block] float32."""
    above = leaves["r"] * leaves["scale"]
    size = math.isqrt(2 * above.shape[1]) + 1
    rows, columns = np.triu_indices(size, 1)
    upper = jnp.zeros((len(above), size, size)).at[:, rows, columns].set(above)
    q = upper - upper.transpose(0, 2, 1)
    squared = q @ q
    return jnp.eye(size) + 2 * q + 2 * squared + 2 * squared @ q + squared @ squared


def oft(leaves: Leaves, x: jax.Array, inside: Inside, ctx: Context) -> jax.Array:
    """The adapted map of x [batch, sequence, inputs...]."""
    turns = rotations(leaves).astype(x.dtype)
    parts = x.reshape(*x.shape[:2], *turns.shape[:2])
    return inside.biased(inside.product(jnp.einsum("bsrk,rkc->bsrc", parts, turns).reshape(x.shape), ctx))


def merge(leaves: Leaves, inside: Inside) -> Inside:
    """The plain map that computes the same."""
    turns = rotations(leaves)
    parts = inside.kernel.reshape(*turns.shape[:2], -1)
    return inside.replaced(kernel=jnp.einsum("rkc,rco->rko", turns, parts).reshape(inside.kernel.shape))


OFT = Method(starts={"zero": start}, apply=oft, merge=merge, trained=("r",))
