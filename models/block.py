"""One transformer block: `block(x, ctx) -> (x, entries)`, with every tensor that a memory policy may name.

    x ─ norm ─ q k v ─ rotate ─ attend ─ o ─(+)─ norm ─ gate up ─ act ─ down ─(+)─ x
Between blocks the sequence is sharded over `tensor` too; norms run on it so, and the linear maps read it gathered.
`entries` are the layer's keys and values for a cache (`kv_cache.py`), None in training.
"""

from functools import partial

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from ..configs.sections.model import ModelConfig
from .attention.interface import Mask
from .context import Context
from .kv_cache import attended_keys_values
from .layers import LayerNorm, Linear, RMSNorm, dropout
from .rope import make_rotations, rotate

RESIDUAL = ("batch", "block_sequence", None)  # between blocks
GATHERED = ("batch", "sequence", None)  # before a linear map
GELU = partial(jax.nn.gelu, approximate=True)  # GPT-2 and Gemma were trained with the tanh form
ACTIVATIONS = {"swiglu": jax.nn.silu, "geglu": GELU, "gelu": GELU}


def norm(config: ModelConfig, width: int) -> RMSNorm | LayerNorm:
    """The model's kind of norm over the last dimension."""
    if config.norm == "layer":
        return LayerNorm(width, epsilon=config.norm_epsilon)
    return RMSNorm(width, epsilon=config.norm_epsilon, unit_offset=config.norm_unit_offset)


class Attention(nnx.Module):
    """Grouped-query self-attention with optional biases, head norms, window and soft-cap."""

    prefix = None  # this layer's keys and values before every document (`adapters/prefix.py`)
    adapter = None  # a perceptron at the attention (`adapters/bottleneck.py`)

    def __init__(self, config: ModelConfig, *, window: int | None, rngs: nnx.Rngs):
        heads, kv_heads, width = config.heads, config.key_value_heads, config.head_width
        self.q = Linear((config.embed,), (heads, width), bias=config.qkv_bias, rngs=rngs)
        self.k = Linear((config.embed,), (kv_heads, width), bias=config.qkv_bias, rngs=rngs)
        self.v = Linear((config.embed,), (kv_heads, width), bias=config.qkv_bias, rngs=rngs)
        self.o = Linear((heads, width), (config.embed,), bias=config.linear_bias, rngs=rngs)
        if config.qk_norm:
            make_norm = partial(RMSNorm, epsilon=config.norm_epsilon, unit_offset=config.norm_unit_offset)
            over_all_heads = config.qk_norm_whole
            self.q_norm = make_norm(heads * width, dimensions=2) if over_all_heads else make_norm(width)
            self.k_norm = make_norm(kv_heads * width, dimensions=2) if over_all_heads else make_norm(width)
        self.config, self.window = config, window

    def __call__(self, x: jax.Array, ctx: Context) -> tuple[jax.Array, dict | None]:
        config = self.config
        q = ctx.constrain(self.q(x, ctx), ("batch", "sequence", "heads", None))
        k = ctx.constrain(self.k(x, ctx), ("batch", "sequence", "kv_heads", None))
        v = checkpoint_name(ctx.constrain(self.v(x, ctx), ("batch", "sequence", "kv_heads", None)), "v")
        if config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if config.position_encoding == "rope":
            rotation = (ctx.rotations or make_rotations(config, ctx.positions))[self.window is not None]
            q, k = rotate(q, rotation), rotate(k, rotation)
        q, k = checkpoint_name(q, "q"), checkpoint_name(k, "k")
        mask = Mask(window=self.window, softcap=config.attention_softcap, scale=config.attention_scale)
        prefix, attend = (ctx.prefix, ctx.attend) if self.prefix is None else self.prefix(x, ctx)
        k, v, indices, entries = attended_keys_values(k, v, ctx, prefix=prefix)
        out = ctx.constrain(attend(q, k, v, mask, indices), ("batch", "sequence", "heads", None))
        y = self.o(out, ctx)
        if self.adapter is not None:
            y = self.adapter(x, y, ctx)
        return checkpoint_name(ctx.constrain(y, RESIDUAL), "attn_proj"), entries


class MLP(nnx.Module):
    """down(act(gate(x)) * up(x)), or down(act(up(x))) without a gate."""

    adapter = None  # a perceptron at the MLP (`adapters/bottleneck.py`)

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        widen = partial(Linear, (config.embed,), (config.mlp,), bias=config.linear_bias, rngs=rngs)
        self.gate = widen() if config.activation != "gelu" else None
        self.up = widen()
        self.down = Linear((config.mlp,), (config.embed,), bias=config.linear_bias, rngs=rngs)
        self.activation = ACTIVATIONS[config.activation]

    def __call__(self, x: jax.Array, ctx: Context) -> jax.Array:
        names = ("batch", "sequence", "mlp")
        up = checkpoint_name(ctx.constrain(self.up(x, ctx), names), "mlp_up")
        if self.gate is None:
            act = self.activation(up)
        else:
            act = self.activation(checkpoint_name(ctx.constrain(self.gate(x, ctx), names), "mlp_gate")) * up
        act = checkpoint_name(act, "mlp_act")
        y = self.down(act, ctx)
        if self.adapter is not None:
            y = self.adapter(x, y, ctx)
        return checkpoint_name(ctx.constrain(y, RESIDUAL), "mlp_out")


class Block(nnx.Module):
    """Attention and MLP around the residual stream; with `parallel_block` both read one norm and are added at once."""

    def __init__(self, config: ModelConfig, *, kind: int | None, rngs: nnx.Rngs):
        self.attn_norm = norm(config, config.embed) if config.pre_norms else None
        self.attn = Attention(config, window=kind, rngs=rngs)
        self.mlp_norm = norm(config, config.embed) if config.pre_norms and not config.parallel_block else None
        self.mlp = MLP(config, rngs=rngs)
        self.attn_post_norm = norm(config, config.embed) if config.post_norms else None
        self.mlp_post_norm = norm(config, config.embed) if config.post_norms else None
        self.config = config

    def __call__(self, x: jax.Array, ctx: Context) -> tuple[jax.Array, dict | None]:
        """x [batch, sequence, embed] -> the same shape, and this layer's entries for the cache (None without one)."""
        x = checkpoint_name(ctx.constrain(x, RESIDUAL), "block_in")
        normed = self._normalize(x, self.attn_norm, ctx, name="attn_norm")
        attention, entries = self.attn(normed, ctx)
        x = x + self._update(attention, self.attn_post_norm, ctx, salt=0)
        if not self.config.parallel_block:
            normed = self._normalize(x, self.mlp_norm, ctx, name="mlp_norm")
        return x + self._update(self.mlp(normed, ctx), self.mlp_post_norm, ctx, salt=1), entries

    def _normalize(self, x: jax.Array, pre_norm: nnx.Module | None, ctx: Context, *, name: str) -> jax.Array:
        if pre_norm is None:
            return ctx.constrain(x, GATHERED)
        return checkpoint_name(ctx.constrain(pre_norm(x), GATHERED), name)

    def _update(self, update: jax.Array, post_norm: nnx.Module | None, ctx: Context, *, salt: int) -> jax.Array:
        if post_norm is not None:
            update = post_norm(update)
        return dropout(update, ctx.dropout_keys, rate=self.config.dropout, salt=salt, index=ctx.index)
