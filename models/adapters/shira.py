"""SHiRA trains a few entries of a weight, as many as LoRA of the same rank has. Source: arXiv:2406.13175.

    y = x (W + D) + bias      D: `values` [rank (inputs + outputs)] at `indices` [2, the same], zero elsewhere

The indices are drawn once, without repetition, and never change. `scale` [1] is one, or zero in a layer without
adapter.
"""

import math

import jax
import jax.numpy as jnp

from ..context import Context
from .interface import BaseLinear, InitContext, Leaves, LinearMethod


def init(key: jax.Array, kernel: jax.Array, context: InitContext) -> tuple[jax.Array, Leaves]:
    """(kernel, leaves) before the first step."""
    inputs, outputs = math.prod(context.inputs), math.prod(context.outputs)
    count = min(context.rank * (inputs + outputs), inputs * outputs)
    flat = jax.random.choice(key, inputs * outputs, (count,), replace=False).astype(jnp.int32)
    indices = jnp.stack([flat // outputs, flat % outputs])
    return kernel, {"values": jnp.zeros(count), "indices": indices, "scale": context.scale}


def dense_delta(leaves: Leaves, shape: tuple[int, ...], inputs: int) -> jax.Array:
    """D [inputs..., outputs...] float32."""
    rows, columns = leaves["indices"]
    zeros = jnp.zeros((math.prod(shape[:inputs]), math.prod(shape[inputs:])))
    return zeros.at[rows, columns].add(leaves["values"] * leaves["scale"]).reshape(shape)


def apply(leaves: Leaves, x: jax.Array, base: BaseLinear, ctx: Context) -> jax.Array:
    """The adapted map of x [batch, sequence, inputs...]."""

    def multiply(x: jax.Array, leaves: Leaves, kernel: jax.Array) -> jax.Array:
        weight = base.replace(kernel=kernel).gathered_kernel(ctx) + dense_delta(leaves, kernel.shape, base.inputs)
        return ctx.linear(x, weight.astype(ctx.compute_dtype), inputs=base.inputs)

    # Recomputed in the backward pass: to keep the sums of all layers would be to keep a second model.
    return base.add_bias(jax.checkpoint(multiply)(x, leaves, base.kernel))


def merge(leaves: Leaves, base: BaseLinear) -> BaseLinear:
    """The plain map that computes the same."""
    return base.replace(kernel=base.kernel + dense_delta(leaves, base.kernel.shape, base.inputs))


SHIRA = LinearMethod(initializers={"zero": init}, apply=apply, merge=merge, trained_leaves=("values",))
