"""The decoder: embed -> segments -> final_norm -> head. A pipeline may cut it between repeats of a segment.

A segment is (pattern of block kinds, repeats): its weights are stacked [repeats, ...] for each position of the pattern,
and it is scanned over its repeats, or unrolled over the same stacked arrays. Parameters are plain nested dicts:

    params = initial_params(config, key)     # segments/0/1/block/attn/q/kernel: [repeats, embed, heads, head_dim]
    hidden, _ = nnx.merge(decoder_graphdef(config), params).hidden(tokens, ctx)
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ..configs.sections.model import ModelConfig
from .block import RESIDUAL, Block, norm
from .context import Context
from .kv_cache import Cache, empty_cache
from .rope import make_rotations

Params = dict[str, Any]


class Stack(nnx.Module):
    """`repeats` blocks of one kind; every weight has a leading [repeats]."""

    def __init__(self, config: ModelConfig, *, kind: int | None, repeats: int, rngs: nnx.Rngs):
        def weights(key: jax.Array) -> Params:
            return nnx.to_pure_dict(nnx.state(Block(config, kind=kind, rngs=nnx.Rngs(params=key))))

        block = Block(config, kind=kind, rngs=nnx.Rngs(params=rngs.params()))
        self.block = nnx.merge(nnx.graphdef(block), jax.vmap(weights)(jax.random.split(rngs.params(), repeats)))


class Embed(nnx.Module):
    """Token embedding [padded_vocab, embed], and the learned positions where the model has them."""

    adapter = None  # trained rows of some tokens (`adapters/tokens.py`)

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        rows = jax.random.normal(rngs.params(), (config.padded_vocab, config.embed)) * 0.02
        self.embedding = nnx.Param(jnp.where(jnp.arange(config.padded_vocab)[:, None] < config.vocab, rows, 0))
        if config.position_encoding == "learned":
            table = jax.random.normal(rngs.params(), (config.max_positions, config.embed)) * 0.02
            self.positions = nnx.Param(table)
        self.config = config

    def __call__(self, tokens: jax.Array, ctx: Context) -> jax.Array:
        # Rows are cast, not the table: the gradient of a frequent token is a long sum, computed in the table's dtype.
        x = ctx.lookup(self.embedding[...], tokens).astype(ctx.compute_dtype)
        if self.adapter is not None:
            x = self.adapter(tokens, x)
        return ctx.constrain(self.block_input(x, ctx), RESIDUAL)

    def block_input(self, x: jax.Array, ctx: Context) -> jax.Array:
        """The input of the first block from embeddings x [batch, sequence, embed]: scaled, plus learned positions."""
        if self.config.embedding_scale:
            x = x * jnp.asarray(self.config.embed**0.5, x.dtype)
        if self.config.position_encoding == "learned":
            x = x + jnp.take(self.positions[...], ctx.positions, axis=0).astype(ctx.compute_dtype)
        return x

    def table(self) -> jax.Array:
        """[padded_vocab, embed]: the embeddings of all tokens, trained rows included."""
        return self.embedding[...] if self.adapter is None else self.adapter.table(self.embedding[...])


class Head(nnx.Module):
    """The output map [embed, padded_vocab] of an untied model."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        kernel = jax.random.normal(rngs.params(), (config.embed, config.padded_vocab)) * config.embed**-0.5
        self.kernel = nnx.Param(jnp.where(jnp.arange(config.padded_vocab) < config.vocab, kernel, 0))


class Decoder(nnx.Module):
    """A decoder-only transformer. Weights are float32 here; `initial_params` casts them."""

    adapter = None  # matrices that the adapters of all layers share (`adapters/vera.py`)
    prompt = None  # virtual tokens before every document (`adapters/prompt.py`)
    prefix_length = 0  # tokens whose keys precede every document; they take the first positions

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.embed = Embed(config, rngs=rngs)
        self.segments = nnx.Dict(
            {
                str(number): nnx.Dict(
                    {
                        str(position): Stack(config, kind=kind, repeats=repeats, rngs=rngs)
                        for position, kind in enumerate(pattern)
                    }
                )
                for number, (pattern, repeats) in enumerate(config.segments)
            }
        )
        self.final_norm = norm(config, config.embed)
        self.head = None if config.tied_embeddings else Head(config, rngs=rngs)
        self.config = config

    def hidden(self, tokens: jax.Array, ctx: Context) -> tuple[jax.Array, Cache | None]:
        """tokens [batch, sequence] -> (the head's input [batch, sequence, embed], entries for the cache).

        Entries are shaped like the cache and hold these tokens only; None where `ctx` has no cache.
        """
        if self.adapter is not None:
            ctx = dataclasses.replace(ctx, shared_matrices=self.adapter())
        if self.prompt is not None and ctx.prefix is None:
            ctx = dataclasses.replace(ctx, prefix=self.prefix(ctx))
        ctx = dataclasses.replace(ctx, positions=ctx.positions + self.prefix_length)
        x, entries = self._run_segments(self.embed(tokens, ctx), ctx)
        return self.final_norm(x), None if ctx.cache is None else entries

    def prefix(self, ctx: Context) -> Cache:
        """Keys and values of the prompt's virtual tokens in all layers: the value of `ctx.prefix`."""
        return self.keys_and_values(self.prompt(), ctx)

    def keys_and_values(self, rows: jax.Array, ctx: Context) -> Cache:
        """Keys and values [repeats, tokens, kv_heads, head_dim] of a document with embeddings `rows` [tokens, embed].

        The rows need not be rows of the table. They are few: every device computes them all.
        """
        count = len(rows)
        document = Context(
            positions=jnp.arange(count)[None],
            index=jnp.arange(count, dtype=jnp.int32),
            shared_matrices=ctx.shared_matrices,
            remat=ctx.remat,
            compute_dtype=ctx.compute_dtype,
        )
        document = dataclasses.replace(document, cache=empty_cache(self.config, rows=1, capacity=count, ctx=document))
        x = self.embed.block_input(rows[None].astype(ctx.compute_dtype), document)
        _, entries = self._run_segments(x, document)
        return jax.tree.map(lambda leaf: leaf[:, 0], entries)

    def _run_segments(self, x: jax.Array, ctx: Context) -> tuple[jax.Array, Cache]:
        """(output of all blocks, their entries) for x [batch, sequence, embed]."""
        ctx = dataclasses.replace(ctx, rotations=make_rotations(self.config, ctx.positions))
        loop = jax.lax.scan if self.config.scan else unrolled_scan
        entries, first = {}, 0
        for number, (pattern, repeats) in enumerate(self.config.segments):
            stacks = [self.segments[str(number)][str(position)] for position in range(len(pattern))]
            cache, prefix = (
                [None] * len(pattern) if segments is None else segments[str(number)]
                for segments in (ctx.cache, ctx.prefix)
            )
            layers = first + np.arange(repeats * len(pattern)).reshape(repeats, len(pattern))
            x, entries[str(number)] = run_segment(stacks, x, ctx, cache, prefix, layers=layers, loop=loop)
            first += layers.size
        return x, entries

    def head_kernel(self, dtype: Any) -> jax.Array:
        """[embed, padded_vocab]; the transposed embedding of a tied model."""
        weight = self.embed.table().T if self.head is None else self.head.kernel[...]
        return weight.astype(dtype)


def run_segment(
    stacks: list[Stack],
    x: jax.Array,
    ctx: Context,
    cache: list[Any],
    prefix: list[Any],
    *,
    layers: np.ndarray,
    loop: Callable[..., Any],
) -> tuple[jax.Array, list[Any]]:
    """Run a pattern of blocks, one stack a position, over its repeats by `loop` (`jax.lax.scan` or `unrolled_scan`).

    `layers` [repeats, positions] are the blocks' numbers in the model, for dropout keys. `cache` and `prefix` have one
    {"k", "v"} a position, stacked like the weights, or None; so have the returned entries.
    """
    graphs, weights = zip(*(nnx.split(stack.block) for stack in stacks), strict=True)

    def run_pattern(x: jax.Array, repeat: tuple[Any, Any, Any, jax.Array]) -> tuple[jax.Array, list[Any]]:
        entries = []
        for graph, weights, cache, prefix, layer in zip(graphs, *repeat, strict=True):
            x, new = run_block(graph, weights, x, layer_context(ctx, layer, cache, prefix))
            entries.append(new)
        return x, entries

    return loop(run_pattern, x, (weights, cache, prefix, layers))


def unrolled_scan(body: Callable[..., Any], carry: Any, inputs: Any) -> tuple[Any, Any]:
    """`jax.lax.scan` with one copy of the body per step and no loop, which XLA:CPU runs 15-25 % faster."""
    # One split, not n slices: the gradient of a split is one concatenation, that of n slices is n padded sums.
    leaves, tree = jax.tree.flatten(inputs)
    steps = leaves[0].shape[0]
    parts = [[part.squeeze(0) for part in jax.lax.split(leaf, (1,) * steps)] for leaf in leaves]
    outputs = []
    for step in range(steps):
        carry, output = body(carry, jax.tree.unflatten(tree, [part[step] for part in parts]))
        outputs.append(output)
    return carry, jax.tree.map(lambda *leaves: jnp.stack(leaves), *outputs)


def run_block(graph: Any, weights: Any, x: jax.Array, ctx: Context) -> tuple[jax.Array, Any]:
    """One block under the memory policy `ctx.remat`."""

    def block(weights: Any, x: jax.Array) -> tuple[jax.Array, Any]:
        return nnx.merge(graph, weights)(x, ctx)

    return ctx.remat(block)(weights, x)


def layer_context(ctx: Context, layer: jax.Array, cache: Any = None, prefix: Any = None) -> Context:
    """The context of block number `layer`: with its own dropout keys, cache and prefix."""
    keys = ctx.dropout_keys
    if keys is not None:
        keys = jax.vmap(lambda key: jax.random.fold_in(key, layer))(keys)
    return dataclasses.replace(ctx, cache=cache, prefix=prefix, dropout_keys=keys)


def decoder_graphdef(config: ModelConfig, insert_modules: Callable[[Decoder], None] = lambda decoder: None) -> Any:
    """The graph definition that `nnx.merge` puts parameters into. Allocates nothing.

    `insert_modules` changes the decoder first, e.g. inserts adapters.
    """
    graphdefs = []

    def build() -> Params:
        decoder = Decoder(config, rngs=nnx.Rngs(params=jax.random.key(0)))
        insert_modules(decoder)
        graphdef, state = nnx.split(decoder)
        graphdefs.append(graphdef)
        return nnx.to_pure_dict(state)

    jax.eval_shape(build)
    return graphdefs[0]


def initial_params(config: ModelConfig, key: jax.Array, dtype: Any = jnp.float32) -> Params:
    """Parameters before the first step, as nested dicts. Call it under `jax.jit` with `out_shardings` to shard them."""
    state = nnx.to_pure_dict(nnx.state(Decoder(config, rngs=nnx.Rngs(params=key))))
    return jax.tree.map(lambda leaf: leaf.astype(dtype), state)
