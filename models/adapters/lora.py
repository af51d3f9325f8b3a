"""LoRA adds the product of two thin matrices to a linear map; DoRA scales the columns of the sum to a learned norm.

    lora:  y = x W + ((x A) * scale) B + bias                                              arXiv:2106.09685
    dora:  y = (x W + ((x A) * scale) B) * m / |W + A scale B| + bias, |.| over inputs      arXiv:2402.09353

A [inputs..., rank], B [rank, outputs...], scale [rank], m [outputs...], for one layer; a stack is mapped by `vmap`.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from ..context import Context
from .interface import BaseLinear, InitContext, Leaves, LinearMethod

LOFTQ_ITERATIONS = 5  # of the paper; PEFT runs 1


def init_lora(key: jax.Array, kernel: jax.Array, context: InitContext) -> tuple[jax.Array, Leaves]:
    """A is uniform within 1 / sqrt(inputs) and B is zero, as in PEFT."""
    rank, inputs, outputs = context.scale.shape[0], context.inputs, context.outputs
    bound = math.prod(inputs) ** -0.5
    leaves = {
        "a": jax.random.uniform(key, (*inputs, rank), jnp.float32, -bound, bound),
        "b": jnp.zeros((rank, *outputs)),
        "scale": context.scale,
    }
    return kernel, leaves


def init_pissa(key: jax.Array, kernel: jax.Array, context: InitContext) -> tuple[jax.Array, Leaves]:
    """PiSSA: A B is made of the `rank` largest singular directions; the kernel keeps the rest. arXiv:2404.02948."""
    del key
    return subtract_svd(kernel, context)


def init_olora(key: jax.Array, kernel: jax.Array, context: InitContext) -> tuple[jax.Array, Leaves]:
    """OLoRA: the first directions of a QR decomposition of the transposed kernel. Source: arXiv:2406.01775."""
    del key
    q, r = jnp.linalg.qr(as_matrix(kernel, context).T)  # [outputs, k], [k, inputs]
    # PEFT subtracts scale * A B from the kernel, but does not divide its factors by the scale.
    return subtract_product(kernel, r.T, q.T, context, factor_scale=jnp.sqrt(context.scale))


def init_loftq(key: jax.Array, kernel: jax.Array, context: InitContext) -> tuple[jax.Array, Leaves]:
    """LoftQ alternates: quantize the kernel less A B, then fit A B to the error. arXiv:2310.08659, algorithm 1.

    The kernel becomes that of the last iteration: after quantization, it plus A B is close to the original kernel.
    """
    rest, leaves = kernel, init_lora(key, kernel, context)[1]
    for iteration in range(LOFTQ_ITERATIONS):
        if iteration:
            rest = (kernel.astype(jnp.float32) - delta_weight(leaves)).astype(kernel.dtype)
        error = as_matrix(kernel, context) - as_matrix(context.fake_quantize(rest), context)
        leaves = subtract_svd(error, context)[1]
    return rest, leaves


def subtract_svd(kernel: jax.Array, context: InitContext) -> tuple[jax.Array, Leaves]:
    """`subtract_product` of the kernel's own singular value decomposition."""
    u, s, vt = jnp.linalg.svd(as_matrix(kernel, context), full_matrices=False)
    return subtract_product(kernel, u * jnp.sqrt(s), jnp.sqrt(s)[:, None] * vt, context)


def subtract_product(
    kernel: jax.Array, a: jax.Array, b: jax.Array, context: InitContext, *, factor_scale: Any = 1.0
) -> tuple[jax.Array, Leaves]:
    """(kernel less the product of the first `rank` columns of a [inputs, k] and rows of b [k, outputs], leaves).

    A and B are those columns and rows times `factor_scale` and over the square root of the scale, so that scale * A B
    is what was subtracted. Nothing is subtracted at ranks a layer lacks (scale zero). Ranks above k are zeros.
    """
    rank = context.scale.shape[0]
    padding = max(rank - a.shape[1], 0)
    a, b = jnp.pad(a[:, :rank], ((0, 0), (0, padding))), jnp.pad(b[:rank], ((0, padding), (0, 0)))
    has_rank = context.scale > 0
    factor = jnp.where(has_rank, factor_scale / jnp.sqrt(jnp.where(has_rank, context.scale, 1)), 0)
    a, b = a * factor, b * factor[:, None]
    rest = as_matrix(kernel, context) - (a * context.scale) @ b
    leaves = {
        "a": a.reshape(*context.inputs, rank),
        "b": b.reshape(rank, *context.outputs),
        "scale": context.scale,
    }
    return rest.reshape(kernel.shape).astype(kernel.dtype), leaves


def as_matrix(kernel: jax.Array, context: InitContext) -> jax.Array:
    """The kernel as [inputs, outputs] float32."""
    return kernel.astype(jnp.float32).reshape(math.prod(context.inputs), math.prod(context.outputs))


def low_rank_update(leaves: Leaves, x: jax.Array, base: BaseLinear, ctx: Context) -> jax.Array:
    """((x A) * scale) B for x [batch, sequence, inputs...]."""
    narrow = ctx.linear(base.dropout(x, ctx), leaves["a"].astype(ctx.compute_dtype), inputs=base.inputs)
    scaled = narrow * leaves["scale"].astype(ctx.compute_dtype)
    return ctx.linear(scaled, leaves["b"].astype(ctx.compute_dtype), inputs=1)


def apply_lora(leaves: Leaves, x: jax.Array, base: BaseLinear, ctx: Context) -> jax.Array:
    """The adapted map of x [batch, sequence, inputs...]."""
    return base.add_bias(base.multiply(x, ctx) + low_rank_update(leaves, x, base, ctx))


def delta_weight(leaves: Leaves) -> jax.Array:
    """A scale B [inputs..., outputs...] float32."""
    return jnp.tensordot(leaves["a"] * leaves["scale"], leaves["b"], axes=1)


def merge_lora(leaves: Leaves, base: BaseLinear) -> BaseLinear:
    """The plain map that computes the same."""
    return base.replace(kernel=base.kernel + delta_weight(leaves))


def init_dora(init: Any) -> Any:
    """The initializer of DoRA from one of LoRA: m is the norm of each column of the adapted weight."""

    def init_with_magnitude(key: jax.Array, kernel: jax.Array, context: InitContext) -> tuple[jax.Array, Leaves]:
        kernel, leaves = init(key, kernel, context)
        quantized = context.fake_quantize(kernel.astype(jnp.float32))
        return kernel, leaves | {"magnitude": column_norms(leaves, quantized, len(context.inputs))}

    return init_with_magnitude


def column_norms(leaves: Leaves, kernel: jax.Array, inputs: int) -> jax.Array:
    """|W + A scale B| over the inputs, [outputs...] float32, from thin products: the sum itself is never formed."""
    axes = list(range(inputs))
    a, b = leaves["a"], leaves["scale"].reshape(-1, *[1] * (leaves["b"].ndim - 1)) * leaves["b"]
    cross = jnp.tensordot(a, kernel, axes=(axes, axes))  # [rank, outputs...]
    inner = jnp.tensordot(jnp.tensordot(a, a, axes=(axes, axes)), b, axes=1)
    return jnp.sqrt(jnp.sum(jnp.square(kernel), axis=tuple(axes)) + jnp.sum((2 * cross + inner) * b, axis=0))


def magnitude_over_norm(leaves: Leaves, kernel: jax.Array, inputs: int) -> jax.Array:
    """m / |W + A scale B|, [outputs...] float32; 1 in a layer without adapter.

    No gradient flows through the norm: section 4.3 of the paper.
    """
    norms = column_norms(leaves, kernel, inputs)
    return jnp.where(jnp.any(leaves["scale"] > 0), leaves["magnitude"] / jax.lax.stop_gradient(norms), 1)


def apply_dora(leaves: Leaves, x: jax.Array, base: BaseLinear, ctx: Context) -> jax.Array:
    """The adapted map of x [batch, sequence, inputs...]."""
    y = base.multiply(x, ctx) + low_rank_update(leaves, x, base, ctx)
    return base.add_bias(y * magnitude_over_norm(leaves, base.gathered_kernel(ctx), base.inputs).astype(y.dtype))


def merge_dora(leaves: Leaves, base: BaseLinear) -> BaseLinear:
    """The plain map that computes the same."""
    kernel = base.kernel + delta_weight(leaves)
    return base.replace(kernel=kernel * magnitude_over_norm(leaves, base.kernel, base.inputs))


INITIALIZERS = {"zero": init_lora, "pissa": init_pissa, "olora": init_olora, "loftq": init_loftq}
LORA = LinearMethod(initializers=INITIALIZERS, apply=apply_lora, merge=merge_lora, trained_leaves=("a", "b"))
DORA = LinearMethod(
    initializers={name: init_dora(init) for name, init in INITIALIZERS.items()},
    apply=apply_dora,
    merge=merge_dora,
    trained_leaves=("a", "b", "magnitude"),
)
