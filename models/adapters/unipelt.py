"""UniPELT: LoRA on queries and values, a prefix, and a perceptron behind the MLP, each behind a gate. arXiv:2110.07577.

    q, v:      x W + gate * (x A) B                                         the gate is of x, what attention reads
    attention: over [gate * prefix k; k], [gate * prefix v; v]              of x
    mlp:       y + gate * (relu(y down + down_bias) up + up_bias)           of y, what the MLP makes

    gate = sigmoid(token . gate + gate_bias)        one number a token, of each part of each layer; at first near 1/2

Departs: the paper's gate is the mean of these numbers over a text. In a model that writes, that mean would tell a token
of those that follow it, and would change what was read before with every token that is added. Here a token's gate is of
that token alone, and a query's gate is what it sees the prefix through: for a text of one token, the paper's equations.
"""

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ...configs.sections.adapter import AdapterConfig
from ...configs.sections.model import ModelConfig
from ..attention.interface import Mask, TokenIndices
from ..context import Context
from ..decoder import Params
from ..quantized.kernel import QuantizedArray
from . import bottleneck, lora, prefix
from .adapted_modules import layer_stacks, linear_maps, rank_and_scale, select_names
from .interface import AddedModule, BaseLinear, InitContext, Leaves

MAPS = ("attn/q", "attn/v")  # that have LoRA
GATE_DEVIATION = 0.02  # of the perceptron's gate in the authors' code, https://github.com/morningmoni/UniPELT
SALT = 1 << 21  # of the gates' and factors' keys: the parts are started by the same key


class Gate(nnx.Module):
    """One number for each token."""

    def __init__(self, leaves: Leaves):
        for name, leaf in leaves.items():
            setattr(self, name, nnx.Param(leaf))

    def gate_values(self, x: jax.Array, ctx: Context) -> jax.Array:
        """How far the gate is open, [batch, sequence, 1] in (0, 1), for x [batch, sequence, embed]."""
        own, bias = (leaf[...].astype(ctx.compute_dtype) for leaf in (self.gate, self.gate_bias))
        return jax.nn.sigmoid(ctx.linear(x, own[:, None], inputs=1) + bias)


class GatedLora(Gate):
    """LoRA beside the kernel of one map."""

    def __call__(
        self, x: jax.Array, kernel: jax.Array | QuantizedArray, bias: jax.Array | None, ctx: Context, *, inputs: int
    ) -> jax.Array:
        """x [batch, sequence, embed] -> [batch, sequence, heads, head_dim]."""
        inside = BaseLinear(kernel, bias, inputs)
        leaves = {name: getattr(self, name)[...] for name in ("a", "b", "scale")}
        gate = self.gate_values(x, ctx)[..., None]
        return inside.add_bias(inside.multiply(x, ctx) + gate * lora.low_rank_update(leaves, x, inside, ctx))


class GatedPrefix(Gate):
    """Keys and values of one layer, which each query sees through its own gate."""

    def __call__(self, x: jax.Array, ctx: Context) -> tuple[Leaves, Callable[..., jax.Array]]:
        """What attention puts in front of its own, and how it attends then."""
        leaves = {"k": self.k[...], "v": self.v[...]}
        return leaves, gate_prefix(self.gate_values(x, ctx)[..., None], ctx.attend, length=len(leaves["k"]))


class GatedBottleneck(Gate, bottleneck.Bottleneck):
    """The perceptron behind the MLP of one block."""

    def __init__(self, leaves: Leaves):
        bottleneck.Bottleneck.__init__(self, leaves, behind=True)

    def __call__(self, x: jax.Array, y: jax.Array, ctx: Context) -> jax.Array:
        """x is what the MLP reads, y what it makes, both [batch, sequence, embed]."""
        del x
        read = ctx.constrain(y, bottleneck.GATHERED)
        return y + self.gate_values(read, ctx) * self.added(read, ctx)


def gate_prefix(gate: jax.Array, attend: Callable[..., jax.Array], *, length: int) -> Callable[..., jax.Array]:
    """`attend` over keys of which the first `length` and their values are multiplied by each query's own `gate`.

    `gate` is [batch, queries, 1, 1]. A key that depended on its query would fit no kernel. Heads twice as wide do: in
    one half of them lies what is gated and in the other what is not, and a query has itself in both, once gated.
    """

    def run(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, where: TokenIndices) -> jax.Array:
        gated = (jnp.arange(k.shape[1]) < length)[:, None, None]

        def halves(x: jax.Array) -> jax.Array:
            return jnp.concatenate([jnp.where(gated, 0, x), jnp.where(gated, x, 0)], axis=-1)

        narrow = dataclasses.replace(mask, scale=q.shape[-1] ** -0.5 if mask.scale is None else mask.scale)
        out = attend(jnp.concatenate([q, gate * q], axis=-1), halves(k), halves(v), narrow, where)
        plain, seen = jnp.split(out, 2, axis=-1)
        return plain + gate * seen

    return run


def init_gates(key: jax.Array, *, layers: int, width: int) -> Leaves:
    """The leaves of one gate in each of `layers`."""
    return {"gate": GATE_DEVIATION * jax.random.normal(key, (layers, width)), "gate_bias": jnp.zeros((layers, 1))}


def rank_masks(model: ModelConfig, adapter: AdapterConfig, part: str) -> dict[str, np.ndarray]:
    """Path of each stack of `part` -> [layers, rank] float32: 1 up to a layer's own rank, 0 beyond.

    Raises UserError for a pattern of `adapter.ranks` that matches nothing.
    """
    names = [f"layers/{layer}/{one}" for layer in range(model.layers) for one in (*MAPS, "mlp")]
    select_names("adapter.ranks", adapter.ranks, names)
    found = {}
    for path, layers in layer_stacks(model):
        ranks = np.array([rank_and_scale(f"layers/{layer}/{part}", adapter)[0] for layer in layers])
        found[f"{path}/{part}"] = (np.arange(ranks.max()) < ranks[:, None]).astype(np.float32)
    return found


def init_lora(weights: Params, model: ModelConfig, adapter: AdapterConfig, key: jax.Array) -> dict[str, Leaves]:
    """LoRA as it always starts; the gate is in the place of its scale."""
    del weights
    found = {}
    for place, part in enumerate(MAPS):
        sizes = linear_maps(model)[part]
        for number, (path, inside) in enumerate(rank_masks(model, adapter, part).items()):
            keys = jax.random.split(jax.random.fold_in(key, SALT + 2 * number + place), len(inside) + 1)
            leaves = jax.vmap(partial(factors, *sizes))(keys[1:], jnp.asarray(inside))
            found[f"{path}/adapter"] = leaves | init_gates(keys[0], layers=len(inside), width=model.embed)
    return found


def factors(inputs: tuple[int, ...], outputs: tuple[int, ...], key: jax.Array, scale: jax.Array) -> Leaves:
    """The leaves of LoRA beside one layer's map, `scale` [rank]."""
    return lora.init_lora(key, jnp.zeros(()), InitContext(inputs, outputs, scale, is_down_projection=False))[1]


def init_prefix(weights: Params, model: ModelConfig, adapter: AdapterConfig, key: jax.Array) -> dict[str, Leaves]:
    """A prefix as it always starts."""
    own = jax.random.fold_in(key, SALT - 1)
    return {
        path: leaves | init_gates(jax.random.fold_in(own, number), layers=len(leaves["k"]), width=model.embed)
        for number, (path, leaves) in enumerate(prefix.init(weights, model, adapter, key).items())
    }


def init_bottleneck(weights: Params, model: ModelConfig, adapter: AdapterConfig, key: jax.Array) -> dict[str, Leaves]:
    """A serial perceptron as it always starts; what a narrower layer does not have is zero and stays so."""
    found, own = {}, jax.random.fold_in(key, SALT - 2)
    for number, (path, inside) in enumerate(rank_masks(model, adapter, "mlp").items()):
        alone = {"method": "serial", "targets": ["mlp"], "rank": inside.shape[1]}
        every = bottleneck.init(weights, model, adapter.model_copy(update=alone), key)
        leaves = every[f"{path}/adapter"]
        leaves["down"] *= inside[:, None, :]
        found[f"{path}/adapter"] = leaves | init_gates(
            jax.random.fold_in(own, number), layers=len(inside), width=model.embed
        )
    return found


def trained_suffixes(*parts: str, leaves: tuple[str, ...]) -> tuple[str, ...]:
    """Ends of the paths of `leaves` of `parts`, and of their gates."""
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
