"""IA3: three learned vectors a block and nothing else. Source: arXiv:2205.05638.

    k, v, or any map but down:  y = (x W + bias) * l         down:  y = (x * l) W + bias

l starts at ones. `scale` [1] is one, or zero in a layer of the stack that has no adapter.
"""

import jax
import jax.numpy as jnp

from ..context import Context
from .interface import Inside, Leaves, Method, Setting


def start(key: jax.Array, kernel: jax.Array, setting: Setting) -> tuple[jax.Array, Leaves]:
    """(kernel, leaves) before the first step: a vector of ones where the map reads, or where it answers."""
    del key
    vector = {"input_scale": jnp.ones(setting.inputs)} if setting.scales_input else {}
    return kernel, (vector or {"output_scale": jnp.ones(setting.outputs)}) | {"scale": setting.scale}


def vector(leaves: Leaves) -> jax.Array:
    """l, or ones in a layer without adapter."""
    given = leaves["input_scale"] if "input_scale" in leaves else leaves["output_scale"]
    return 1 + leaves["scale"] * (given - 1) if given.ndim == 1 else 1 + leaves["scale"][:, None] * (given - 1)


def ia3(leaves: Leaves, x: jax.Array, inside: Inside, ctx: Context) -> jax.Array:
    """The adapted map of x [batch, sequence, inputs...]."""
    if "input_scale" in leaves:
        return inside.biased(inside.product(x * vector(leaves).astype(x.dtype), ctx))
    y = inside.biased(inside.product(x, ctx))
    return y * vector(leaves).astype(y.dtype)


def merge(leaves: Leaves, inside: Inside) -> Inside:
    """The plain map that computes the same."""
    own = vector(leaves)
    if "input_scale" in leaves:
        return inside.replaced(kernel=inside.kernel * own.reshape(*own.shape, *[1] * (inside.kernel.ndim - own.ndim)))
    return inside.replaced(kernel=inside.kernel * own, bias=None if inside.bias is None else inside.bias * own)


IA3 = Method(starts={"zero": start}, apply=ia3, merge=merge, trained=("input_scale", "output_scale"))
