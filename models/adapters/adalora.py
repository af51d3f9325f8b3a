"""AdaLoRA: an added map in the form of a singular value decomposition; training distributes its rank over the layers.

    y = x W + ((x A) * e * scale) B + bias      A [inputs..., rank], e, scale [rank], B [rank, outputs...]

`train/optim/adalora_schedule.py` keeps A and B nearly orthogonal, and sets the least important entries of e to zero on
a schedule. e starts at zero. Source: arXiv:2303.10512.
"""

import jax
import jax.numpy as jnp

from ..context import Context
from .interface import BaseLinear, InitContext, Leaves, LinearMethod
from .lora import apply_lora, merge_lora

INIT_DEVIATION = 0.02  # of A and B before the first step, as in PEFT


def init(key: jax.Array, kernel: jax.Array, context: InitContext) -> tuple[jax.Array, Leaves]:
    """(kernel, leaves) before the first step."""
    rank = context.scale.shape[0]
    key_a, key_b = jax.random.split(key)
    return kernel, {
        "a": INIT_DEVIATION * jax.random.normal(key_a, (*context.inputs, rank)),
        "b": INIT_DEVIATION * jax.random.normal(key_b, (rank, *context.outputs)),
        "e": jnp.zeros(rank),
        "scale": context.scale,
    }


def as_lora(leaves: Leaves) -> Leaves:
    """The leaves of the LoRA that computes the same."""
    return {"a": leaves["a"], "b": leaves["b"], "scale": leaves["e"] * leaves["scale"]}


def apply(leaves: Leaves, x: jax.Array, base: BaseLinear, ctx: Context) -> jax.Array:
    """The adapted map of x [batch, sequence, inputs...]."""
    return apply_lora(as_lora(leaves), x, base, ctx)


def merge(leaves: Leaves, base: BaseLinear) -> BaseLinear:
    """The plain map that computes the same."""
    return merge_lora(as_lora(leaves), base)


ADALORA = LinearMethod(initializers={"zero": init}, apply=apply, merge=merge, trained_leaves=("a", "b", "e"))
