"""AdaLoRA: an added map in the form of a singular value decomposition, whose rank is shared out while it is trained.

    y = x W + ((x A) * e * scale) B + bias      A [inputs..., rank], e, scale [rank], B [rank, outputs...]

A and B are kept near orthogonal, and the least important entries of e become zero on a schedule:
`train/optim/adalora_schedule.py` does both to the updates. e starts at zero. Source: arXiv:2303.10512.
"""

import jax
import jax.numpy as jnp

from ..context import Context
from .interface import BaseLinear, InitContext, Leaves, LinearMethod
from .lora import apply_lora, merge_lora

INIT_DEVIATION = 0.02  # of the first A and B, as in PEFT


def init(key: jax.Array, kernel: jax.Array, context: InitContext) -> tuple[jax.Array, Leaves]:
    """(kernel, leaves) before the first step."""
    rank = context.scale.shape[0]
    first, second = jax.random.split(key)
    return kernel, {
        "a": INIT_DEVIATION * jax.random.normal(first, (*context.inputs, rank)),
        "b": INIT_DEVIATION * jax.random.normal(second, (rank, *context.outputs)),
        "e": jnp.zeros(rank),
        "scale": context.scale,
    }


def as_lora(leaves: Leaves) -> Leaves:
    """The leaves of LoRA that computes the same."""
    return {"a": leaves["a"], "b": leaves["b"], "scale": leaves["e"] * leaves["scale"]}


def apply(leaves: Leaves, x: jax.Array, base: BaseLinear, ctx: Context) -> jax.Array:
    """The adapted map of x [batch, sequence, inputs...]."""
    return apply_lora(as_lora(leaves), x, base, ctx)


def merge(leaves: Leaves, base: BaseLinear) -> BaseLinear:
    """The plain map that computes the same."""
    return merge_lora(as_lora(leaves), base)


ADALORA = LinearMethod(initializers={"zero": init}, apply=apply, merge=merge, trained_leaves=("a", "b", "e"))
