"""Bottleneck adapters: a small two-layer perceptron behind or beside the attention or the MLP of a block.

    serial:    y + scale * (relu(y down + down_bias) up + up_bias)        behind both (arXiv:1902.00751)
    parallel:  y + scale * (relu(x down + down_bias) up + up_bias)        beside the MLP, x what it reads (2110.04366)

down [embed, rank], up [rank, embed], biases [rank], [embed]; scale [1] is adapter.alpha / rank, or zero in a layer of
the stack that has none. `up` starts at zero.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from ...configs.sections.adapter import AdapterConfig
from ...configs.sections.model import ModelConfig
from ..context import Context
from ..decoder import Params
from .adapted_modules import in_trained_layers, layer_stacks, select_names
from .interface import AddedModule, Leaves

GATHERED = ("batch", "sequence", None)
TRAINED_SUFFIXES = tuple(
    f"/{part}/adapter/{leaf}" for part in ("attn", "mlp") for leaf in ("down", "down_bias", "up", "up_bias")
)


class Bottleneck(nnx.Module):
    """The perceptron of one part of one block; `behind` it or beside it."""

    def __init__(self, leaves: Leaves, *, behind: bool):
        for name, leaf in leaves.items():
            setattr(self, name, nnx.Param(leaf))
        self.behind = behind

    def __call__(self, x: jax.Array, y: jax.Array, ctx: Context) -> jax.Array:
        """x is what the part reads, y what it makes, both [batch, sequence, embed]."""
        return y + self.update(ctx.constrain(y, GATHERED) if self.behind else x, ctx)

    def update(self, read: jax.Array, ctx: Context) -> jax.Array:
        """What is added to y [batch, sequence, embed]."""
        down, up, bias, last = (
            leaf[...].astype(ctx.compute_dtype) for leaf in (self.down, self.up, self.down_bias, self.up_bias)
        )
        made = ctx.linear(jax.nn.relu(ctx.linear(read, down, inputs=1) + bias), up, inputs=1) + last
        return self.scale[...].astype(ctx.compute_dtype) * made


def serial(leaves: Leaves) -> Bottleneck:
    """Behind a part."""
    return Bottleneck(leaves, behind=True)


def parallel(leaves: Leaves) -> Bottleneck:
    """Beside a part."""
    return Bottleneck(leaves, behind=False)


def init(weights: Params, model: ModelConfig, adapter: AdapterConfig, key: jax.Array) -> dict[str, Leaves]:
    """Leaves of every stack with a layer that `adapter` picks. Raises UserError for a pattern that matches nothing."""
    del weights
    parts = ("attn", "mlp")
    names = [f"layers/{layer}/{part}" for layer in range(model.layers) for part in parts]
    usual = parts if adapter.method == "serial" else ("mlp",)
    chosen = in_trained_layers(select_names("adapter.targets", adapter.targets or usual, names), model, adapter)
    factor = 1.0 if adapter.alpha is None else adapter.alpha / adapter.rank
    found = {}
    for number, (path, layers) in enumerate(layer_stacks(model)):
        for place, part in enumerate(parts):
            scales = [factor if f"layers/{layer}/{part}" in chosen else 0.0 for layer in layers]
            if any(scales):
                own = jax.random.fold_in(key, 2 * number + place)
                bound = model.embed**-0.5
                found[f"{path}/{part}/adapter"] = {
                    "down": jax.random.uniform(
                        own, (len(layers), model.embed, adapter.rank), jnp.float32, -bound, bound
                    ),
                    "down_bias": jnp.zeros((len(layers), adapter.rank)),
                    "up": jnp.zeros((len(layers), adapter.rank, model.embed)),
                    "up_bias": jnp.zeros((len(layers), model.embed)),
                    "scale": jnp.asarray(scales, jnp.float32)[:, None],
                }
    return found


SERIAL = AddedModule(init, serial, trained_suffixes=TRAINED_SUFFIXES)
PARALLEL = AddedModule(init, parallel, trained_suffixes=TRAINED_SUFFIXES)
