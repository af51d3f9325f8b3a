"""UniPELT: LoRA on queries and values, a prefix, and a perceptron after the MLP, each behind a gate. arXiv:2110.07577.

    q, v:      x W + gate * (x A) B                                    the gate reads x, the input of attention
    attention: over [gate * prefix k; k], [gate * prefix v; v]         the gate reads x
    mlp:       y + gate * (relu(y down + down_bias) up + up_bias)      the gate reads y, the output of the MLP

    gate = sigmoid(token . gate + gate_bias)        one number a token, for each part of each layer; near 1/2 at first

Departs from the paper, whose gate is the mean of these numbers over a text. In a causal model that mean would depend on
the tokens that follow, and each generated token would change what was computed before it. Here the gate of a token
reads that token alone, and a query sees the prefix through its own gate. For a text of one token these are the paper's
equations.
"""

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from ...configs.sections.adapter import AdapterConfig
from ...configs.sections.model import ModelConfig
from ..attention.interface import Mask, TokenIndices
from ..context import Context
from ..decoder import Params
from ..quantized.kernel import QuantizedArray
from . import bottleneck, lora, prefix
from .adapted_modules import layer_stacks, linear_maps, rank_and_scale, select_names
from .interface import AddedModule, BaseLinear, InitContext, LeafModule, Leaves

MAPS = ("attn/q", "attn/v")  # the linear maps with LoRA
GATE_DEVIATION = 0.02  # of the perceptron's gate in the authors' code, https://github.com/morningmoni/UniPELT
SALT = 1 << 21  # keeps the keys of gates and LoRA apart from those of the other parts, which share one key


class Gate(LeafModule):
    """A gate in front of one part of one block: one number for each token."""

    def gate_values(self, x: jax.Array, ctx: Context) -> jax.Array:
        """How far the gate is open, [batch, sequence, 1] in (0, 1), for x [batch, sequence, embed]."""
        weight, bias = (leaf[...].astype(ctx.compute_dtype) for leaf in (self.gate, self.gate_bias))
        return jax.nn.sigmoid(ctx.linear(x, weight[:, None], inputs=1) + bias)


class GatedLora(Gate):
    """LoRA beside the kernel of one map, behind a gate."""

    def __call__(
        self, x: jax.Array, kernel: jax.Array | QuantizedArray, bias: jax.Array | None, ctx: Context, *, inputs: int
    ) -> jax.Array:
        """x [batch, sequence, embed] -> [batch, sequence, heads, head_dim]."""
        base = BaseLinear(kernel, bias, inputs)
        leaves = {name: getattr(self, name)[...] for name in ("a", "b", "scale")}
        gate = self.gate_values(x, ctx)[..., None]
        return base.add_bias(base.multiply(x, ctx) + gate * lora.low_rank_update(leaves, x, base, ctx))


class GatedPrefix(Gate):
    """Keys and values of one layer, which each query sees through its own gate."""

    def __call__(self, x: jax.Array, ctx: Context) -> tuple[Leaves, Callable[..., jax.Array]]:
        """(keys and values to prepend, the attention to use); x [batch, sequence, embed] is the attention's input."""
        leaves = {"k": self.k[...], "v": self.v[...]}
        return leaves, gate_prefix(self.gate_values(x, ctx)[..., None], ctx.attend, length=len(leaves["k"]))


class GatedBottleneck(bottleneck.Bottleneck, Gate):
    """The perceptron after the MLP of one block, behind a gate."""

    def __init__(self, leaves: Leaves):
        super().__init__(leaves, serial=True)

    def __call__(self, x: jax.Array, y: jax.Array, ctx: Context) -> jax.Array:
        """x [batch, sequence, embed] is the MLP's input, y of the same shape its output."""
        del x
        gathered = ctx.constrain(y, bottleneck.GATHERED)
        return y + self.gate_values(gathered, ctx) * self.update(gathered, ctx)


def gate_prefix(gate: jax.Array, attend: Callable[..., jax.Array], *, length: int) -> Callable[..., jax.Array]:
    """`attend` with the first `length` keys and values multiplied by each query's `gate` [batch, queries, 1, 1].

    No attention kernel takes a key that depends on its query, but all take heads that are twice as wide: one half
    holds the prefix and the other half the document's keys, and a query is in both, once multiplied by its gate.
    """

    def gated_attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, indices: TokenIndices) -> jax.Array:
        is_prefix = (jnp.arange(k.shape[1]) < length)[:, None, None]

        def in_halves(x: jax.Array) -> jax.Array:
            return jnp.concatenate([jnp.where(is_prefix, 0, x), jnp.where(is_prefix, x, 0)], axis=-1)

        # The scale is that of the model's own heads, not of the doubled ones.
        mask = dataclasses.replace(mask, scale=q.shape[-1] ** -0.5 if mask.scale is None else mask.scale)
        out = attend(jnp.concatenate([q, gate * q], axis=-1), in_halves(k), in_halves(v), mask, indices)
        from_document, from_prefix = jnp.split(out, 2, axis=-1)
        return from_document + gate * from_prefix

    return gated_attend


def init_gates(key: jax.Array, *, layers: int, width: int) -> Leaves:
    """The leaves of one gate in each of `layers` layers."""
    return {"gate": GATE_DEVIATION * jax.random.normal(key, (layers, width)), "gate_bias": jnp.zeros((layers, 1))}


def rank_masks(model: ModelConfig, adapter: AdapterConfig, part: str) -> dict[str, np.ndarray]:
    """Path of each stack of `part` -> [layers, rank] float32: 1 up to the layer's rank, 0 beyond.

    Raises UserError for a pattern of `adapter.ranks` that matches nothing.
    """
    names = [f"layers/{layer}/{name}" for layer in range(model.layers) for name in (*MAPS, "mlp")]
    select_names("adapter.ranks", adapter.ranks, names)
    masks = {}
    for path, layers in layer_stacks(model):
        ranks = np.array([rank_and_scale(f"layers/{layer}/{part}", adapter)[0] for layer in layers])
        masks[f"{path}/{part}"] = (np.arange(ranks.max()) < ranks[:, None]).astype(np.float32)
    return masks


def init_lora(weights: Params, model: ModelConfig, adapter: AdapterConfig, key: jax.Array) -> dict[str, Leaves]:
    """LoRA's own start; a mask of ranks takes the place of its scale."""
    del weights
    modules = {}
    for position, part in enumerate(MAPS):
        init_layers = jax.vmap(partial(init_lora_layer, *linear_maps(model)[part]))
        for number, (path, mask) in enumerate(rank_masks(model, adapter, part).items()):
            keys = jax.random.split(jax.random.fold_in(key, SALT + 2 * number + position), len(mask) + 1)
            leaves = init_layers(keys[1:], jnp.asarray(mask))
            modules[f"{path}/adapter"] = leaves | init_gates(keys[0], layers=len(mask), width=model.embed)
    return modules


def init_lora_layer(inputs: tuple[int, ...], outputs: tuple[int, ...], key: jax.Array, mask: jax.Array) -> Leaves:
    """The leaves of LoRA in one layer; `mask` [rank] is its scale."""
    return lora.init_lora(key, jnp.zeros(()), InitContext(inputs, outputs, mask, is_down_projection=False))[1]


def init_prefix(weights: Params, model: ModelConfig, adapter: AdapterConfig, key: jax.Array) -> dict[str, Leaves]:
    """Prefix tuning's own start, with gates."""
    gate_key = jax.random.fold_in(key, SALT - 1)
    return {
        path: leaves | init_gates(jax.random.fold_in(gate_key, number), layers=len(leaves["k"]), width=model.embed)
        for number, (path, leaves) in enumerate(prefix.init(weights, model, adapter, key).items())
    }


def init_bottleneck(weights: Params, model: ModelConfig, adapter: AdapterConfig, key: jax.Array) -> dict[str, Leaves]:
    """A serial bottleneck's own start, with gates; the columns that a narrower layer lacks are zero and stay so."""
    modules, gate_key = {}, jax.random.fold_in(key, SALT - 2)
    for number, (path, mask) in enumerate(rank_masks(model, adapter, "mlp").items()):
        serial = adapter.model_copy(update={"method": "serial", "targets": ["mlp"], "rank": mask.shape[1]})
        leaves = bottleneck.init(weights, model, serial, key)[f"{path}/adapter"]
        leaves["down"] *= mask[:, None, :]
        stack_key = jax.random.fold_in(gate_key, number)
        modules[f"{path}/adapter"] = leaves | init_gates(stack_key, layers=len(mask), width=model.embed)
    return modules


def trained_suffixes(*parts: str, leaves: tuple[str, ...]) -> tuple[str, ...]:
    """Suffixes of the paths of `leaves` in `parts`, and of their gates."""
    return tuple(f"/{part}/{leaf}" for part in parts for leaf in (*leaves, "gate", "gate_bias"))


UNIPELT = (
    AddedModule(
        init_lora,
        GatedLora,
        trained_suffixes=trained_suffixes(*(f"{part}/adapter" for part in MAPS), leaves=("a", "b")),
    ),
    AddedModule(
        init_prefix, GatedPrefix, trained_suffixes=trained_suffixes("attn/prefix", leaves=("k", "v")), is_prefix=True
    ),
    AddedModule(
        init_bottleneck,
        GatedBottleneck,
        trained_suffixes=trained_suffixes("mlp/adapter", leaves=("down", "down_bias", "up", "up_bias")),
    ),
)
