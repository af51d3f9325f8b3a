"""Rotary position embedding, half-split pairs (i, i + head_dim / 2), with linear, llama3 and YaRN stretching.

A pair turns by position * frequency; frequencies fall geometrically from 1 to 1 / theta. Stretching divides
frequencies by `factor`, wholly (linear), or only the slow ones (llama3: by wavelength; YaRN, arXiv:2309.00071: by
rotations over the original length, and cos and sin are scaled by an attention factor).
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..configs.sections.model import ModelConfig, RopeConfig


def frequencies(rope: RopeConfig, *, head_dim: int, local: bool) -> tuple[np.ndarray, float]:
    """Radians a position of each pair, [head_dim / 2] float64, and the factor on cos and sin.

    `local` layers turn by `rope.local_theta`, unstretched, where it is set.
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

    >>> geometric(100.0, head_dim=4)
    array([1. , 0.1])
    """
    return theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)


def yarn_frequencies(rope: RopeConfig, plain: np.ndarray, *, head_dim: int) -> tuple[np.ndarray, float]:
    """A blend of left alone and divided by `factor`, on a ramp over pairs. Source: YaRN, arXiv:2309.00071, 3.2."""

    def dimension(rotations: float) -> float:
        """The (fractional) pair that turns `rotations` times over the original length."""
        return head_dim * math.log(rope.original_length / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    first = max(math.floor(dimension(rope.beta_fast)), 0)
    last = min(math.ceil(dimension(rope.beta_slow)), head_dim - 1)
    ramp = np.clip((np.arange(head_dim // 2) - first) / max(last - first, 1e-3), 0, 1)
    given = rope.attention_factor
    return plain * (1 - ramp + ramp / rope.factor), 0.1 * math.log(rope.factor) + 1 if given is None else given


class Rotation(NamedTuple):
    """How far each pair of each token turns."""

    cos: jax.Array  # [batch, sequence, 1, head_dim / 2] float32, times the attention factor
    sin: jax.Array


def make_rotation(rope: RopeConfig, positions: jax.Array, *, head_dim: int, local: bool) -> Rotation:
    """The turn of tokens at `positions` [batch, sequence]; angles in float32."""
    rates, factor = frequencies(rope, head_dim=head_dim, local=local)
    angles = positions.astype(jnp.float32)[..., None, None] * jnp.asarray(rates, jnp.float32)
    # A loop of two, for XLA:CPU would fuse plain cosines into every layer that reads them, and once for every head.
    cos, sin = jax.lax.map(lambda which: factor * jax.lax.cond(which == 0, jnp.cos, jnp.sin, angles), jnp.arange(2))
    return Rotation(cos, sin)


def make_rotations(model: ModelConfig, positions: jax.Array) -> dict[bool, Rotation]:
    """The turns of a model's layers, by whether a layer is local (has a window); {} where nothing rotates."""
    if model.position_encoding != "rope":
        return {}
    kinds = {window is not None for window in model.windows}
    return {kind: make_rotation(model.rope, positions, head_dim=model.head_width, local=kind) for kind in kinds}


def rotate(x: jax.Array, rotation: Rotation) -> jax.Array:
    """x [batch, sequence, heads, head_dim], each pair (i, i + head_dim / 2) turned, in float32."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate(
        [first * rotation.cos - second * rotation.sin, second * rotation.cos + first * rotation.sin], axis=-1
    )
    return turned.astype(x.dtype)
