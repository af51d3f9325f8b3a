"""LoRA and DoRA: a linear map plus a product of two thin ones, and that with its columns brought to a learned length.

    lora:  y = x W + ((x A) * scale) B + bias                                              arXiv:2106.09685
    dora:  y = (x W + ((x A) * scale) B) * m / |W + A scale B| + bias, |.| over inputs      arXiv:2402.09353

A [inputs..., rank], B [rank, outputs...], scale [rank], m [outputs...]. All of it is one layer; stacks are mapped over.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from ..context import Context
from .interface import BaseLinear, InitContext, Leaves, LinearMethod

LOFTQ_ITERATIONS = 5  # of the paper; PEFT takes 1


def init_lora(key: jax.Array, kernel: jax.Array, context: InitContext) -> tuple[jax.Array, Leaves]:
    """(kernel, leaves) before the first step: A uniform within 1 / sqrt(inputs), B zero; as PEFT does."""
    rank, inputs, outputs = context.scale.shape[0], context.inputs, context.outputs
    bound = math.prod(inputs) ** -0.5
    leaves = {
        "a": jax.random.uniform(key, (*inputs, rank), jnp.float32, -bound, bound),
        "b": jnp.zeros((rank, *outputs)),
        "scale": context.scale,
    }
    return kernel, leaves


def init_pissa(key: jax.Array, kernel: jax.Array, context: InitContext) -> tuple[jax.Array, Leaves]:
    """PiSSA: the `rank` largest singular directions are trained, the kernel keeps the rest. arXiv:2404.02948."""
    del key
    u, s, vt = jnp.linalg.svd(as_matrix(kernel, context), full_matrices=False)
    return subtract_product(kernel, u * jnp.sqrt(s), jnp.sqrt(s)[:, None] * vt, context)


def init_olora(key: jax.Array, kernel: jax.Array, context: InitContext) -> tuple[jax.Array, Leaves]:
    """OLoRA: the first directions of a QR decomposition of the transposed kernel. Source: arXiv:2406.01775."""
    del key
    q, r = jnp.linalg.qr(as_matrix(kernel, context).T)  # [outputs, k], [k, inputs]
    # PEFT multiplies what it takes out by the scale, and its factors by nothing.
    root = jnp.sqrt(context.scale)
    return subtract_product(kernel, r.T, q.T, context, factor_scale=root)


def init_loftq(key: jax.Array, kernel: jax.Array, context: InitContext) -> tuple[jax.Array, Leaves]:
    """LoftQ: in turns, quantize what A B does not hold, and put into A B what that lost. arXiv:2310.08659, algorithm 1.

    The kernel is what is left of it in the last turn: quantized, it and A B are near the whole one.
    """
    rest, leaves = kernel, init_lora(key, kernel, context)[1]
    for turn in range(LOFTQ_ITERATIONS):
        if turn:
            rest = (kernel.astype(jnp.float32) - delta_weight(leaves)).astype(kernel.dtype)
        lost = as_matrix(kernel, context) - as_matrix(context.fake_quantize(rest), context)
        u, s, vt = jnp.linalg.svd(lost, full_matrices=False)
        leaves = subtract_product(lost, u * jnp.sqrt(s), jnp.sqrt(s)[:, None] * vt, context)[1]
    return rest, leaves


def subtract_product(
    kernel: jax.Array, a: jax.Array, b: jax.Array, context: InitContext, *, factor_scale: Any = 1.0
) -> tuple[jax.Array, Leaves]:
    """The kernel without the product of the first `rank` columns of a [inputs, k] and rows of b [k, outputs].

    A and B are these times `taken` and over the root of the scale, so that scale * A B is what was taken out. What a
    layer does not have, its scale being zero, stays in the kernel. A rank above k is filled with zeros.
    """
    rank = context.scale.shape[0]
    room = max(rank - a.shape[1], 0)
    a, b = jnp.pad(a[:, :rank], ((0, 0), (0, room))), jnp.pad(b[:rank], ((0, room), (0, 0)))
    factor = jnp.where(context.scale > 0, factor_scale / jnp.sqrt(jnp.where(context.scale > 0, context.scale, 1)), 0)
    a, b = a * factor, b * factor[:, None]
    rest = as_matrix(kernel, context) - (a * context.scale) @ b
    leaves = {
        "a": a.reshape(*context.inputs, rank),
        "b": b.reshape(rank, *context.outputs),
        "scale": context.scale,
    }
    return rest.reshape(kernel.shape).astype(kernel.dtype), leaves


def as_matrix(kernel: jax.Array, context: InitContext) -> jax.Array:
    """[inputs, outputs] float32."""
    return kernel.astype(jnp.float32).reshape(math.prod(context.inputs), math.prod(context.outputs))


def low_rank_update(leaves: Leaves, x: jax.Array, base: BaseLinear, ctx: Context) -> jax.Array:
    """((x A) * scale) B."""
    narrow = ctx.linear(base.dropout(x, ctx), leaves["a"].astype(ctx.compute_dtype), inputs=base.inputs)
    return ctx.linear(
        narrow * leaves["scale"].astype(ctx.compute_dtype), leaves["b"].astype(ctx.compute_dtype), inputs=1
    )


def apply_lora(leaves: Leaves, x: jax.Array, base: BaseLinear, ctx: Context) -> jax.Array:
    """The adapted map of x [batch, sequence, inputs...]."""
    return base.add_bias(base.multiply(x, ctx) + low_rank_update(leaves, x, base, ctx))


def delta_weight(leaves: Leaves) -> jax.Array:
    """A scale B [inputs..., outputs...] float32."""
    return jnp.tensordot(leaves["a"] * leaves["scale"], leaves["b"], axes=1)


def merge_lora(leaves: Leaves, base: BaseLinear) -> BaseLinear:
    """The plain map that computes the same."""
    return base.replace(kernel=base.kernel + delta_weight(leaves))


def init_dora(initial: Any) -> Any:
    """The start of DoRA from one of LoRA: m is the length of each column of the whole weight."""

    def both(key: jax.Array, kernel: jax.Array, context: InitContext) -> tuple[jax.Array, Leaves]:
        kernel, leaves = initial(key, kernel, context)
        return kernel, leaves | {
            "magnitude": column_norms(leaves, context.fake_quantize(kernel.astype(jnp.float32)), len(context.inputs))
        }

    return both


def column_norms(leaves: Leaves, kernel: jax.Array, inputs: int) -> jax.Array:
    """|W + A scale B| over the inputs, [outputs...] float32, by products of thin matrices: the sum is never made."""
    axes = list(range(inputs))
    a, b = leaves["a"], leaves["scale"].reshape(-1, *[1] * (leaves["b"].ndim - 1)) * leaves["b"]
    cross = jnp.tensordot(a, kernel, axes=(axes, axes))  # [rank, outputs...]
    inner = jnp.tensordot(jnp.tensordot(a, a, axes=(axes, axes)), b, axes=1)
    return jnp.sqrt(jnp.sum(jnp.square(kernel), axis=tuple(axes)) + jnp.sum((2 * cross + inner) * b, axis=0))


def magnitude_over_norm(leaves: Leaves, kernel: jax.Array, inputs: int) -> jax.Array:
    """m / |W + A scale B|, [outputs...] float32; 1 in a layer without adapter.

    No gradient flows through the length: section 4.3 of the paper.
    """
    length = column_norms(leaves, kernel, inputs)
    return jnp.where(jnp.any(leaves["scale"] > 0), leaves["magnitude"] / jax.lax.stop_gradient(length), 1)


def apply_dora(leaves: Leaves, x: jax.Array, base: BaseLinear, ctx: Context) -> jax.Array:
    """The adapted map of x [batch, sequence, inputs...]."""
    both = base.multiply(x, ctx) + low_rank_update(leaves, x, base, ctx)
    return base.add_bias(both * magnitude_over_norm(leaves, base.gathered_kernel(ctx), base.inputs).astype(both.dtype))


def merge_dora(leaves: Leaves, base: BaseLinear) -> BaseLinear:
    """The plain map that computes the same."""
    return base.replace(
        kernel=(base.kernel + delta_weight(leaves)) * magnitude_over_norm(leaves, base.kernel, base.inputs)
    )


INITIALIZERS = {"zero": init_lora, "pissa": init_pissa, "olora": init_olora, "loftq": init_loftq}
LORA = LinearMethod(initializers=INITIALIZERS, apply=apply_lora, merge=merge_lora, trained_leaves=("a", "b"))
DORA = LinearMethod(
    initializers={name: init_dora(initial) for name, initial in INITIALIZERS.items()},
    apply=apply_dora,
    merge=merge_dora,
    trained_leaves=("a", "b", "magnitude"),
)
