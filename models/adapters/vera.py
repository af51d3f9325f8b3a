"""VeRA: all layers share two random, frozen matrices, and each linear map learns two vectors. arXiv:2310.11454.

    y = x W + (((x A) * d) B) * b + bias     A, B: the first inputs and outputs of the shared [widest, rank] matrices

d starts at 0.1, b at zero. The shared matrices are stored once, at the top of the parameters (adapter/a, adapter/b),
and reach the maps by `ctx.shared_matrices`. `scale` [rank] is one, or zero in a layer of the stack without adapter.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from ..context import Context
from .interface import BaseLinear, InitContext, Leaves, LinearMethod


class SharedMatrices(nnx.Module):
    """The random matrices that all layers share."""

    def __init__(self, a: jax.Array, b: jax.Array):
        self.a, self.b = nnx.Param(a), nnx.Param(b)

    def __call__(self) -> dict[str, jax.Array]:
        """The value of `ctx.shared_matrices`."""
        return {"a": self.a[...], "b": self.b[...]}


def draw_shared_matrices(key: jax.Array, *, inputs: int, outputs: int, rank: int) -> dict[str, jax.Array]:
    """A [inputs, rank] and B [rank, outputs], uniform by Kaiming's rule with slope 0."""

    def kaiming_uniform(key: jax.Array, shape: tuple[int, int]) -> jax.Array:
        bound = math.sqrt(6 / shape[0])
        return jax.random.uniform(key, shape, jnp.float32, -bound, bound)

    key_a, key_b = jax.random.split(key)
    return {"a": kaiming_uniform(key_a, (inputs, rank)), "b": kaiming_uniform(key_b, (rank, outputs))}


def init(key: jax.Array, kernel: jax.Array, context: InitContext) -> tuple[jax.Array, Leaves]:
    """(kernel, leaves) before the first step."""
    del key
    rank = context.scale.shape[0]
    return kernel, {"vera_d": jnp.full(rank, 0.1), "vera_b": jnp.zeros(context.outputs), "scale": context.scale}


def slice_shared_matrices(base: BaseLinear, shared_matrices: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """The shared matrices cut to the inputs and outputs of this map."""
    shape = base.kernel.shape
    inputs, outputs = math.prod(shape[: base.inputs]), math.prod(shape[base.inputs :])
    return {"a": shared_matrices["a"][:inputs], "b": shared_matrices["b"][:, :outputs]}


def factors(leaves: Leaves, base: BaseLinear, shared_matrices: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """A [inputs..., rank] and d scale B [rank, outputs...] from shared matrices that are cut to the map."""
    shape, weights = base.kernel.shape, leaves["vera_d"] * leaves["scale"]
    b = (weights[:, None] * shared_matrices["b"]).reshape(-1, *shape[base.inputs :])
    return shared_matrices["a"].reshape(*shape[: base.inputs], -1), b


def apply(leaves: Leaves, x: jax.Array, base: BaseLinear, ctx: Context) -> jax.Array:
    """The adapted map of x [batch, sequence, inputs...]."""
    # Gathered before they are sliced: the partitioner moves a slice of a sharded dimension by collective permutes.
    shared = slice_shared_matrices(base, ctx.shared_matrices)
    a, b = factors(leaves, base, {name: ctx.constrain(leaf, (None, None)) for name, leaf in shared.items()})
    narrow = ctx.linear(base.dropout(x, ctx), a.astype(ctx.compute_dtype), inputs=base.inputs)
    wide = ctx.linear(narrow, b.astype(ctx.compute_dtype), inputs=1) * leaves["vera_b"].astype(ctx.compute_dtype)
    return base.add_bias(base.multiply(x, ctx) + wide)


def merge(leaves: Leaves, base: BaseLinear) -> BaseLinear:
    """The plain map that computes the same; the shared matrices are among the leaves, as `a` and `b`."""
    a, b = factors(leaves, base, slice_shared_matrices(base, leaves))
    return base.replace(kernel=base.kernel + jnp.tensordot(a, b, axes=1) * leaves["vera_b"])


VERA = LinearMethod(initializers={"zero": init}, apply=apply, merge=merge, trained_leaves=("vera_d", "vera_b"))
