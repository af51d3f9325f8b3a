"""Bottleneck adapters: a small two-layer perceptron at the attention or the MLP of a block.

    serial:    y + scale * (relu(y down + down_bias) up + up_bias)     y is the output of either (arXiv:1902.00751)
    parallel:  y + scale * (relu(x down + down_bias) up + up_bias)     x is the input of the MLP (arXiv:2110.04366)

down [embed, rank], up [rank, embed], biases [rank], [embed]; scale [1] is adapter.alpha / rank, or zero in a layer of
the stack that has no adapter. `up` starts at zero.
"""

from functools import partial

import jax
import jax.numpy as jnp

from ...configs.sections.adapter import AdapterConfig
from ...configs.sections.model import ModelConfig
from ..context import Context
from ..decoder import Params
from .adapted_modules import in_trained_layers, layer_stacks, select_names
from .interface import AddedModule, LeafModule, Leaves

GATHERED = ("batch", "sequence", None)
PARTS = ("attn", "mlp")
TRAINED_SUFFIXES = tuple(f"/{part}/adapter/{leaf}" for part in PARTS for leaf in ("down", "down_bias", "up", "up_bias"))


class Bottleneck(LeafModule):
    """The perceptron of one part of one block; `serial`: it reads the part's output, else the part's input."""

    def __init__(self, leaves: Leaves, *, serial: bool):
        super().__init__(leaves)
        self.serial = serial

    def __call__(self, x: jax.Array, y: jax.Array, ctx: Context) -> jax.Array:
        """x [batch, sequence, embed] is the part's input, y of the same shape its output."""
        return y + self.update(ctx.constrain(y, GATHERED) if self.serial else x, ctx)

    def update(self, x: jax.Array, ctx: Context) -> jax.Array:
        """What the perceptron adds to the part's output, from x [batch, sequence, embed]."""
        down, up, down_bias, up_bias = (
            leaf[...].astype(ctx.compute_dtype) for leaf in (self.down, self.up, self.down_bias, self.up_bias)
        )
        hidden = jax.nn.relu(ctx.linear(x, down, inputs=1) + down_bias)
        return self.scale[...].astype(ctx.compute_dtype) * (ctx.linear(hidden, up, inputs=1) + up_bias)


def init(weights: Params, model: ModelConfig, adapter: AdapterConfig, key: jax.Array) -> dict[str, Leaves]:
    """Leaves of every stack with a selected layer. Raises UserError for a pattern that matches nothing."""
    del weights
    names = [f"layers/{layer}/{part}" for layer in range(model.layers) for part in PARTS]
    default = PARTS if adapter.method == "serial" else ("mlp",)
    targets = in_trained_layers(select_names("adapter.targets", adapter.targets or default, names), model, adapter)
    factor = 1.0 if adapter.alpha is None else adapter.alpha / adapter.rank
    bound = model.embed**-0.5
    leaves = {}
    for number, (path, layers) in enumerate(layer_stacks(model)):
        for position, part in enumerate(PARTS):
            scales = [factor if f"layers/{layer}/{part}" in targets else 0.0 for layer in layers]
            if any(scales):
                part_key = jax.random.fold_in(key, 2 * number + position)
                down = (len(layers), model.embed, adapter.rank)
                leaves[f"{path}/{part}/adapter"] = {
                    "down": jax.random.uniform(part_key, down, jnp.float32, -bound, bound),
                    "down_bias": jnp.zeros((len(layers), adapter.rank)),
                    "up": jnp.zeros((len(layers), adapter.rank, model.embed)),
                    "up_bias": jnp.zeros((len(layers), model.embed)),
                    "scale": jnp.asarray(scales, jnp.float32)[:, None],
                }
    return leaves


SERIAL = AddedModule(init, partial(Bottleneck, serial=True), trained_suffixes=TRAINED_SUFFIXES)
PARALLEL = AddedModule(init, partial(Bottleneck, serial=False), trained_suffixes=TRAINED_SUFFIXES)
