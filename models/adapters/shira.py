"""SHiRA: a few entries of a weight are trained, as many as LoRA of the same rank has. Source: arXiv:2406.13175.

    y = x (W + D) + bias      D: `values` [rank (inputs + outputs)] at `indices` [2, the same], zero elsewhere

Places are drawn once, without repetition, and never change; `scale` [1] is one, or zero in a layer without adapter.
"""

import math

import jax
import jax.numpy as jnp

from ..context import Context
from .interface import Inside, Leaves, Method, Setting


def start(key: jax.Array, kernel: jax.Array, setting: Setting) -> tuple[jax.Array, Leaves]:
    """(kernel, leaves) before the first step."""
    inputs, outputs = math.prod(setting.inputs), math.prod(setting.outputs)
    count = min(setting.rank * (inputs + outputs), inputs * outputs)
    places = jax.random.choice(key, inputs * outputs, (count,), replace=False).astype(jnp.int32)
    indices = jnp.stack([places // outputs, places % outputs])
    return kernel, {"values": jnp.zeros(count), "indices": indices, "scale": setting.scale}


def whole(leaves: Leaves, shape: tuple[int, ...], inputs: int) -> jax.Array:
    """D [inputs..., outputs...] float32."""
    rows, columns = leaves["indices"]
    flat = jnp.zeros((math.prod(shape[:inputs]), math.prod(shape[inputs:])))
    return flat.at[rows, columns].add(leaves["values"] * leaves["scale"]).reshape(shape)


def shira(leaves: Leaves, x: jax.Array, inside: Inside, ctx: Context) -> jax.Array:
    """The adapted map of x [batch, sequence, inputs...]."""

    def multiply(x: jax.Array, leaves: Leaves, kernel: jax.Array) -> jax.Array:
        both = inside.replaced(kernel=kernel).whole_kernel(ctx) + whole(leaves, kernel.shape, inside.inputs)
        return ctx.linear(x, both.astype(ctx.compute), inputs=inside.inputs)

    # Made again for the backward pass: kept, the sums of all layers would be a second model.
    return inside.biased(jax.checkpoint(multiply)(x, leaves, inside.kernel))


def merge(leaves: Leaves, inside: Inside) -> Inside:
    """The plain map that computes the same."""
    return inside.replaced(kernel=inside.kernel + whole(leaves, inside.kernel.shape, inside.inputs))


SHIRA = Method(starts={"zero": start}, apply=shira, merge=merge, trained=("values",))
