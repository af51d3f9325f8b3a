"""Rotary position embedding on half-split pairs (i, i + head_dim / 2), with linear, llama3 and YaRN scaling.

A pair rotates by position * frequency; frequencies fall geometrically from 1 to 1 / theta. Scaling divides frequencies
by `factor`: all of them (linear), or only the slow ones (llama3: by wavelength; YaRN, arXiv:2309.00071: by rotations
over the original length, and an attention factor multiplies cos and sin).
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..configs.sections.model import ModelConfig, RopeConfig


def frequencies(rope: RopeConfig, *, head_dim: int, local: bool) -> tuple[np.ndarray, float]:
    """(radians per position of each pair [head_dim / 2] float64, factor on cos and sin).

    `local` layers use `rope.local_theta`, without scaling, where it is set.
    """
    if local and rope.local_theta is not None:
        return base_frequencies(rope.local_theta, head_dim=head_dim), 1.0
    plain = base_frequencies(rope.theta, head_dim=head_dim)
    if rope.scaling == "none":
        return plain, 1.0
    if rope.scaling == "linear":
        return plain / rope.factor, 1.0
    if rope.scaling == "llama3":
        rotations = rope.original_length * plain / (2 * math.pi)
        low, high = rope.low_frequency_factor, rope.high_frequency_factor
        unstretched = np.clip((rotations - low) / (high - low), 0, 1)
        return plain * ((1 - unstretched) / rope.factor + unstretched), 1.0
    return yarn_frequencies(rope, plain, head_dim=head_dim)


def base_frequencies(theta: float, *, head_dim: int) -> np.ndarray:
    """theta ** (-2 i / head_dim) for pair i.

    >>> base_frequencies(100.0, head_dim=4)
    array([1. , 0.1])
    """
    return theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)


def yarn_frequencies(rope: RopeConfig, plain: np.ndarray, *, head_dim: int) -> tuple[np.ndarray, float]:
    """Interpolate between unchanged and divided by `factor`, on a ramp over pairs. Source: arXiv:2309.00071, 3.2."""

    def pair_with(rotations: float) -> float:
        """The (fractional) number of the pair that rotates `rotations` times over the original length."""
        return head_dim * math.log(rope.original_length / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    first = max(math.floor(pair_with(rope.beta_fast)), 0)
    last = min(math.ceil(pair_with(rope.beta_slow)), head_dim - 1)
    ramp = np.clip((np.arange(head_dim // 2) - first) / max(last - first, 1e-3), 0, 1)
    factor = 0.1 * math.log(rope.factor) + 1 if rope.attention_factor is None else rope.attention_factor
    return plain * (1 - ramp + ramp / rope.factor), factor


class Rotation(NamedTuple):
    """The rotation of each pair of each token."""

    cos: jax.Array  # [batch, sequence, 1, head_dim / 2] float32, times the attention factor
    sin: jax.Array


def make_rotation(rope: RopeConfig, positions: jax.Array, *, head_dim: int, local: bool) -> Rotation:
    """The rotation of tokens at `positions` [batch, sequence]; angles in float32."""
    rates, factor = frequencies(rope, head_dim=head_dim, local=local)
    angles = positions.astype(jnp.float32)[..., None, None] * jnp.asarray(rates, jnp.float32)
    # In a loop of two, because XLA:CPU would fuse plain cosines into every layer that reads them, once for every head.
    cos, sin = jax.lax.map(lambda which: factor * jax.lax.cond(which == 0, jnp.cos, jnp.sin, angles), jnp.arange(2))
    return Rotation(cos, sin)


def make_rotations(model: ModelConfig, positions: jax.Array) -> dict[bool, Rotation]:
    """Whether a layer is local (has a window) -> its rotation; {} for a model without rope."""
    if model.position_encoding != "rope":
        return {}
    kinds = {window is not None for window in model.windows}
    return {kind: make_rotation(model.rope, positions, head_dim=model.head_width, local=kind) for kind in kinds}


def rotate(x: jax.Array, rotation: Rotation) -> jax.Array:
    """Rotate each pair (i, i + head_dim / 2) of x [batch, sequence, heads, head_dim]; computes in float32."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate(
        [first * rotation.cos - second * rotation.sin, second * rotation.cos + first * rotation.sin], axis=-1
    )
    return rotated.astype(x.dtype)
