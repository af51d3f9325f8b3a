"""IA3: three learned vectors a block and nothing else. Source: arXiv:2205.05638.

    all maps but down:  y = (x W + bias) * l         down:  y = (x * l) W + bias

l starts at ones. `scale` [1] is one, or zero in a layer of the stack that has no adapter.
"""

import jax
import jax.numpy as jnp

from ..context import Context
from .interface import BaseLinear, InitContext, Leaves, LinearMethod


def init(key: jax.Array, kernel: jax.Array, context: InitContext) -> tuple[jax.Array, Leaves]:
    """(kernel, leaves) before the first step: a vector of ones, for the input of `down` or the output of other maps."""
    del key
    vector = {"input_scale": jnp.ones(context.inputs)} if context.is_down_projection else {}
    return kernel, (vector or {"output_scale": jnp.ones(context.outputs)}) | {"scale": context.scale}


def effective_vector(leaves: Leaves) -> jax.Array:
    """l, or ones in a layer without adapter."""
    vector = leaves["input_scale"] if "input_scale" in leaves else leaves["output_scale"]
    return 1 + leaves["scale"] * (vector - 1) if vector.ndim == 1 else 1 + leaves["scale"][:, None] * (vector - 1)


def apply(leaves: Leaves, x: jax.Array, base: BaseLinear, ctx: Context) -> jax.Array:
    """The adapted map of x [batch, sequence, inputs...]."""
    if "input_scale" in leaves:
        return base.add_bias(base.multiply(x * effective_vector(leaves).astype(x.dtype), ctx))
    y = base.add_bias(base.multiply(x, ctx))
    return y * effective_vector(leaves).astype(y.dtype)


def merge(leaves: Leaves, base: BaseLinear) -> BaseLinear:
    """The plain map that computes the same."""
    vector = effective_vector(leaves)
    if "input_scale" in leaves:
        return base.replace(kernel=base.kernel * vector.reshape(*vector.shape, *[1] * (base.kernel.ndim - vector.ndim)))
    return base.replace(kernel=base.kernel * vector, bias=None if base.bias is None else base.bias * vector)


IA3 = LinearMethod(
    initializers={"zero": init}, apply=apply, merge=merge, trained_leaves=("input_scale", "output_scale")
)
