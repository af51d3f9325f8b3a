"""VeRA: random maps that all layers share and none trains, and two learned vectors a linear map. arXiv:2310.11454.

    y = x W + (((x A) * d) B) * b + bias     A, B: as many inputs, outputs as needed of the shared [widest, rank] pair

d starts at 0.1, b at zero. The shared pair lives once, at the top of the parameters (adapter/a, adapter/b), and reaches
the maps through `ctx.shared`. `scale` [rank] is one, or zero in a layer of the stack that has no adapter.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from ..context import Context
from .interface import BaseLinear, InitContext, Leaves, LinearMethod


class SharedMatrices(nnx.Module):
    """The random pair of all layers."""

    def __init__(self, a: jax.Array, b: jax.Array):
        self.a, self.b = nnx.Param(a), nnx.Param(b)

    def __call__(self) -> dict[str, jax.Array]:
        """What `ctx.shared` holds."""
        return {"a": self.a[...], "b": self.b[...]}


def draw_shared_matrices(key: jax.Array, *, inputs: int, outputs: int, rank: int) -> dict[str, jax.Array]:
    """A [inputs, rank] and B [rank, outputs], uniform as by Kaiming's rule with slope 0."""

    def uniform(key: jax.Array, shape: tuple[int, int]) -> jax.Array:
        bound = math.sqrt(6 / shape[0])
        return jax.random.uniform(key, shape, jnp.float32, -bound, bound)

    first, second = jax.random.split(key)
    return {"a": uniform(first, (inputs, rank)), "b": uniform(second, (rank, outputs))}


def init(key: jax.Array, kernel: jax.Array, context: InitContext) -> tuple[jax.Array, Leaves]:
    """(kernel, leaves) before the first step."""
    del key
    rank = context.scale.shape[0]
    return kernel, {"vera_d": jnp.full(rank, 0.1), "vera_b": jnp.zeros(context.outputs), "scale": context.scale}


def slice_shared_matrices(base: BaseLinear, pair: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """As much of the shared pair as this map is wide."""
    shape = base.kernel.shape
    inputs, outputs = math.prod(shape[: base.inputs]), math.prod(shape[base.inputs :])
    return {"a": pair["a"][:inputs], "b": pair["b"][:, :outputs]}


def factors(leaves: Leaves, kernel: jax.Array, inputs: int, pair: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """A [inputs..., rank] and d scale B [rank, outputs...] of a pair that is as wide as the map."""
    weights = leaves["vera_d"] * leaves["scale"]
    wide = (weights[:, None] * pair["b"]).reshape(-1, *kernel.shape[inputs:])
    return pair["a"].reshape(*kernel.shape[:inputs], -1), wide


def apply(leaves: Leaves, x: jax.Array, base: BaseLinear, ctx: Context) -> jax.Array:
    """The adapted map of x [batch, sequence, inputs...]."""
    # Cut out whole: a slice of a cut dimension would be moved by permutes.
    pair = {
        name: ctx.constrain(leaf, (None, None))
        for name, leaf in slice_shared_matrices(base, ctx.shared_matrices).items()
    }
    a, b = factors(leaves, base.kernel, base.inputs, pair)
    narrow = ctx.linear(base.dropout(x, ctx), a.astype(ctx.compute_dtype), inputs=base.inputs)
    wide = ctx.linear(narrow, b.astype(ctx.compute_dtype), inputs=1) * leaves["vera_b"].astype(ctx.compute_dtype)
    return base.add_bias(base.multiply(x, ctx) + wide)


def merge(leaves: Leaves, base: BaseLinear) -> BaseLinear:
    """The plain map that computes the same; the shared pair is among the leaves as `a` and `b`."""
    a, b = factors(leaves, base.kernel, base.inputs, slice_shared_matrices(base, leaves))
    return base.replace(kernel=base.kernel + jnp.tensordot(a, b, axes=1) * leaves["vera_b"])


VERA = LinearMethod(initializers={"zero": init}, apply=apply, merge=merge, trained_leaves=("vera_d", "vera_b"))
