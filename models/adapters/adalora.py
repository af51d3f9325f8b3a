"""AdaLoRA: an added map in the form of a singular value decomposition, whose rank is shared out while it is trained.

    y = x W + ((x A) * e * scale) B + bias      A [inputs..., rank], e, scale [rank], B [rank, outputs...]

A and B are kept near orthogonal, and the least important entries of e become zero on a schedule:
`train/optim/adalora_schedule.py` does both to the updates. e starts at zero. Source: arXiv:2303.10512.
"""

import jax
import jax.numpy as jnp

from ..context import Context
from .interface import Inside, Leaves, Method, Setting
from .lora import lora, merge_lora

DEVIATION = 0.02  # of the first A and B, as in PEFT


def start(key: jax.Array, kernel: jax.Array, setting: Setting) -> tuple[jax.Array, Leaves]:
    """(kernel, leaves) before the first step."""
    rank = setting.scale.shape[0]
    first, second = jax.random.split(key)
    return kernel, {
        "a": DEVIATION * jax.random.normal(first, (*setting.inputs, rank)),
        "b": DEVIATION * jax.random.normal(second, (rank, *setting.outputs)),
        "e": jnp.zeros(rank),
        "scale": setting.scale,
    }


def plain(leaves: Leaves) -> Leaves:
    """The leaves of LoRA that computes the same."""
    return {"a": leaves["a"], "b": leaves["b"], "scale": leaves["e"] * leaves["scale"]}


def adalora(leaves: Leaves, x: jax.Array, inside: Inside, ctx: Context) -> jax.Array:
    """The adapted map of x [batch, sequence, inputs...]."""
    return lora(plain(leaves), x, inside, ctx)


def merge(leaves: Leaves, inside: Inside) -> Inside:
    """The plain map that computes the same."""
    return merge_lora(plain(leaves), inside)


ADALORA = Method(starts={"zero": start}, apply=adalora, merge=merge, trained=("a", "b", "e"))
