"""NF4: sixteen levels that normal weights use equally often, times the largest of the group. arXiv:2305.14314.

weight = LEVELS[code] * scale, scale = max |weight| of the group. Codes and scales equal those of bitsandbytes.
"""

import jax
import jax.numpy as jnp
import numpy as np

from .interface import CodeFormat, Leaves

LEVELS = np.array(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ],
    np.float32,
)  # fmt: skip


def nearest_level(values: jax.Array, levels: np.ndarray) -> jax.Array:
    """uint8 index of the nearest of the sorted `levels`."""
    return jnp.searchsorted(jnp.asarray((levels[:-1] + levels[1:]) / 2), values).astype(jnp.uint8)


def look_up_levels(codes: jax.Array, levels: np.ndarray) -> jax.Array:
    """levels[codes]."""
    return jnp.asarray(levels).at[codes].get(mode="promise_in_bounds")


def encode(groups: jax.Array) -> tuple[jax.Array, Leaves]:
    """groups [groups, group, outputs] -> (codes, the scale of each group)."""
    scale = jnp.max(jnp.abs(groups), axis=1)
    return nearest_level(groups / jnp.where(scale > 0, scale, 1)[:, None], LEVELS), {"scale": scale}


def decode(codes: jax.Array, statistics: Leaves) -> jax.Array:
    """The weights [groups, group, outputs] float32."""
    return look_up_levels(codes, LEVELS) * statistics["scale"][:, None]


NF4 = CodeFormat(bits=4, encode=encode, decode=decode)
