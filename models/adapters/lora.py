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
from .interface import Inside, Leaves, Method, Setting

LOFTQ_TURNS = 5  # of the paper; PEFT takes 1


def start(key: jax.Array, kernel: jax.Array, setting: Setting) -> tuple[jax.Array, Leaves]:
    """(kernel, leaves) before the first step: A uniform within 1 / sqrt(inputs), B zero; as PEFT does."""
    rank, inputs, outputs = setting.scale.shape[0], setting.inputs, setting.outputs
    bound = math.prod(inputs) ** -0.5
    leaves = {
        "a": jax.random.uniform(key, (*inputs, rank), jnp.float32, -bound, bound),
        "b": jnp.zeros((rank, *outputs)),
        "scale": setting.scale,
    }
    return kernel, leaves


def principal(key: jax.Array, kernel: jax.Array, setting: Setting) -> tuple[jax.Array, Leaves]:
    """PiSSA: the `rank` largest singular directions are trained, the kernel keeps the rest. arXiv:2404.02948."""
    del key
    u, s, vt = jnp.linalg.svd(flat(kernel, setting), full_matrices=False)
    return without(kernel, u * jnp.sqrt(s), jnp.sqrt(s)[:, None] * vt, setting)


def orthogonal(key: jax.Array, kernel: jax.Array, setting: Setting) -> tuple[jax.Array, Leaves]:
    """OLoRA: the first directions of a QR decomposition of the transposed kernel. Source: arXiv:2406.01775."""
    del key
    q, r = jnp.linalg.qr(flat(kernel, setting).T)  # [outputs, k], [k, inputs]
    # PEFT multiplies what it takes out by the scale, and its factors by nothing.
    root = jnp.sqrt(setting.scale)
    return without(kernel, r.T, q.T, setting, taken=root)


def repaired(key: jax.Array, kernel: jax.Array, setting: Setting) -> tuple[jax.Array, Leaves]:
    """LoftQ: in turns, quantize what A B does not hold, and put into A B what that lost. arXiv:2310.08659, algorithm 1.

    The kernel is what is left of it in the last turn: quantized, it and A B are near the whole one.
    """
    rest, leaves = kernel, start(key, kernel, setting)[1]
    for turn in range(LOFTQ_TURNS):
        if turn:
            rest = (kernel.astype(jnp.float32) - product(leaves)).astype(kernel.dtype)
        lost = flat(kernel, setting) - flat(setting.read(rest), setting)
        u, s, vt = jnp.linalg.svd(lost, full_matrices=False)
        leaves = without(lost, u * jnp.sqrt(s), jnp.sqrt(s)[:, None] * vt, setting)[1]
    return rest, leaves


def without(
    kernel: jax.Array, a: jax.Array, b: jax.Array, setting: Setting, *, taken: Any = 1.0
) -> tuple[jax.Array, Leaves]:
    """The kernel without the product of the first `rank` columns of a [inputs, k] and rows of b [k, outputs].

    A and B are these times `taken` and over the root of the scale, so that scale * A B is what was taken out. What a
    layer does not have, its scale being zero, stays in the kernel. A rank above k is filled with zeros.
    """
    rank = setting.scale.shape[0]
    room = max(rank - a.shape[1], 0)
    a, b = jnp.pad(a[:, :rank], ((0, 0), (0, room))), jnp.pad(b[:rank], ((0, room), (0, 0)))
    factor = jnp.where(setting.scale > 0, taken / jnp.sqrt(jnp.where(setting.scale > 0, setting.scale, 1)), 0)
    a, b = a * factor, b * factor[:, None]
    rest = flat(kernel, setting) - (a * setting.scale) @ b
    leaves = {
        "a": a.reshape(*setting.inputs, rank),
        "b": b.reshape(rank, *setting.outputs),
        "scale": setting.scale,
    }
    return rest.reshape(kernel.shape).astype(kernel.dtype), leaves


def flat(kernel: jax.Array, setting: Setting) -> jax.Array:
    """[inputs, outputs] float32."""
    return kernel.astype(jnp.float32).reshape(math.prod(setting.inputs), math.prod(setting.outputs))


def added(leaves: Leaves, x: jax.Array, inside: Inside, ctx: Context) -> jax.Array:
    """((x A) * scale) B."""
    narrow = ctx.linear(inside.dropped(x, ctx), leaves["a"].astype(ctx.compute), inputs=inside.inputs)
    return ctx.linear(narrow * leaves["scale"].astype(ctx.compute), leaves["b"].astype(ctx.compute), inputs=1)


def lora(leaves: Leaves, x: jax.Array, inside: Inside, ctx: Context) -> jax.Array:
    """The adapted map of x [batch, sequence, inputs...]."""
    return inside.biased(inside.product(x, ctx) + added(leaves, x, inside, ctx))


def product(leaves: Leaves) -> jax.Array:
    """A scale B [inputs..., outputs...] float32."""
    return jnp.tensordot(leaves["a"] * leaves["scale"], leaves["b"], axes=1)


def merge_lora(leaves: Leaves, inside: Inside) -> Inside:
    """The plain map that computes the same."""
    return inside.replaced(kernel=inside.kernel + product(leaves))


def with_magnitude(initial: Any) -> Any:
    """The start of DoRA from one of LoRA: m is the length of each column of the whole weight."""

    def both(key: jax.Array, kernel: jax.Array, setting: Setting) -> tuple[jax.Array, Leaves]:
        kernel, leaves = initial(key, kernel, setting)
        return kernel, leaves | {
            "magnitude": lengths(leaves, setting.read(kernel.astype(jnp.float32)), len(setting.inputs))
        }

    return both


def lengths(leaves: Leaves, kernel: jax.Array, inputs: int) -> jax.Array:
    """|W + A scale B| over the inputs, [outputs...] float32, by products of thin matrices: the sum is never made."""
    axes = list(range(inputs))
    a, b = leaves["a"], leaves["scale"].reshape(-1, *[1] * (leaves["b"].ndim - 1)) * leaves["b"]
    cross = jnp.tensordot(a, kernel, axes=(axes, axes))  # [rank, outputs...]
    inner = jnp.tensordot(jnp.tensordot(a, a, axes=(axes, axes)), b, axes=1)
    return jnp.sqrt(jnp.sum(jnp.square(kernel), axis=tuple(axes)) + jnp.sum((2 * cross + inner) * b, axis=0))


def gain(leaves: Leaves, kernel: jax.Array, inputs: int) -> jax.Array:
    """m / |W + A scale B|, [outputs...] float32; 1 in a layer without adapter.

    No gradient flows through the length: section 4.3 of the paper.
    """
    length = lengths(leaves, kernel, inputs)
    return jnp.where(jnp.any(leaves["scale"] > 0), leaves["magnitude"] / jax.lax.stop_gradient(length), 1)


def dora(leaves: Leaves, x: jax.Array, inside: Inside, ctx: Context) -> jax.Array:
    """The adapted map of x [batch, sequence, inputs...]."""
    both = inside.product(x, ctx) + added(leaves, x, inside, ctx)
    return inside.biased(both * gain(leaves, inside.whole_kernel(ctx), inside.inputs).astype(both.dtype))


def merge_dora(leaves: Leaves, inside: Inside) -> Inside:
    """The plain map that computes the same."""
    return inside.replaced(kernel=(inside.kernel + product(leaves)) * gain(leaves, inside.kernel, inside.inputs))


STARTS = {"zero": start, "pissa": principal, "olora": orthogonal, "loftq": repaired}
LORA = Method(starts=STARTS, apply=lora, merge=merge_lora, trained=("a", "b"))
DORA = Method(
    starts={name: with_magnitude(initial) for name, initial in STARTS.items()},
    apply=dora,
    merge=merge_dora,
    trained=("a", "b", "magnitude"),
)
