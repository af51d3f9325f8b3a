"""Double quantization: the scales of a linear map in eight bits. arXiv:2305.14314, section 3.

    scale = LEVELS[code] * largest + mean      largest |scale - mean| of each 256 scales, one output after another

The levels are the signed dynamic data type of arXiv:1511.04561. Codes and statistics equal those of bitsandbytes.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from .interface import Leaves
from .nf4 import look_up_levels, nearest_level

BLOCK = 256  # scales


def dynamic_levels() -> np.ndarray:
    """[256] float32, sorted, in [-1, 1]: a sign, a decimal exponent in unary, and a fraction in the remaining bits."""
    levels = [0.0, 1.0]
    for exponent in range(7):
        index = np.arange(2**exponent + 1)
        step = np.float64(np.float32(np.float32(1) - np.float32(0.1)) / np.float32(2**exponent))
        # Computed from both ends and rounded once, as `torch.linspace` does in float32.
        up, down = np.float32(0.1) + step * index, 1 - step * index[::-1]
        edges = np.where(index < len(index) // 2, up, down).astype(np.float32)
        middles = np.float32(10.0 ** (exponent - 6)) * ((edges[:-1] + edges[1:]) / np.float32(2))
        levels += [*middles, *-middles]
    return np.sort(np.array(levels, np.float32))


LEVELS = dynamic_levels()


def quantize_scales(scale: jax.Array) -> Leaves:
    """The leaves that hold `scale` [groups, outputs]."""
    mean = jnp.mean(scale)
    flat = (scale - mean).T.reshape(-1)
    blocks = jnp.pad(flat, (0, -flat.size % BLOCK)).reshape(-1, BLOCK)
    largest = jnp.max(jnp.abs(blocks), axis=1)
    codes = nearest_level(blocks / jnp.where(largest > 0, largest, 1)[:, None], LEVELS)
    return {
        "scale": codes.reshape(-1)[: flat.size].reshape(scale.shape[::-1]).T,
        "scale_largest": largest,
        "scale_mean": mean,
    }


def dequantize_scales(leaves: Leaves) -> jax.Array:
    """`scale` [groups, outputs] float32."""
    groups, outputs = leaves["scale"].shape
    # Computed, not stored: it is sharded like the codes, and every device has all of the few `scale_largest`.
    block = (jnp.arange(outputs) * groups + jnp.arange(groups)[:, None]) // BLOCK
    largest = leaves["scale_largest"].at[block].get(mode="promise_in_bounds")
    return look_up_levels(leaves["scale"], LEVELS) * largest + leaves["scale_mean"]


def block_count(groups: int, outputs: int) -> int:
    """How many blocks of scales a linear map has."""
    return math.ceil(groups * outputs / BLOCK)
