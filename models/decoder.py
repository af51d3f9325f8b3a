"""The decoder: embed -> segments -> final_norm -> head, cut where a pipeline may cut it.

A segment is (pattern of block kinds, repeats): its weights are stacked [repeats, ...] for each place in the pattern,
and it is scanned over its repeats, or unrolled over the same stacked arrays. Parameters travel as plain nested dicts:

    params = initial_params(config, key)     # segments/0/1/block/attn/q/kernel: [repeats, embed, heads, head_dim]
    hidden, _ = nnx.merge(graph(config), params).hidden(tokens, ctx)
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

    adapter = None  # other rows for some tokens (`adapters/tokens.py`)

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        rows = jax.random.normal(rngs.params(), (config.padded_vocab, config.embed)) * 0.02
        self.embedding = nnx.Param(jnp.where(jnp.arange(config.padded_vocab)[:, None] < config.vocab, rows, 0))
        if config.position_encoding == "learned":
            table = jax.random.normal(rngs.params(), (config.max_positions, config.embed)) * 0.02
            self.positions = nnx.Param(table)
        self.config = config

    def __call__(self, tokens: jax.Array, ctx: Context) -> jax.Array:
        # Rows are cast, not the table: a frequent token's gradient is a long sum, made in the table's own dtype.
        x = ctx.lookup(self.embedding[...], tokens).astype(ctx.compute_dtype)
        if self.adapter is not None:
            x = self.adapter(tokens, x)
        return ctx.constrain(self.block_input(x, ctx), RESIDUAL)

    def block_input(self, x: jax.Array, ctx: Context) -> jax.Array:
        """What the first block reads of the table's rows x [batch, sequence, embed]: scaled, with their positions."""
        if self.config.embedding_scale:
            x = x * jnp.asarray(self.config.embed**0.5, x.dtype)
        if self.config.position_encoding == "learned":
            x = x + jnp.take(self.positions[...], ctx.positions, axis=0).astype(ctx.compute_dtype)
        return x

    def table(self) -> jax.Array:
        """[padded_vocab, embed]: the rows that tokens have."""
        return self.embedding[...] if self.adapter is None else self.adapter.table(self.embedding[...])


class Head(nnx.Module):
    """The output map [embed, padded_vocab] of an untied model."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        kernel = jax.random.normal(rngs.params(), (config.embed, config.padded_vocab)) * config.embed**-0.5
        self.kernel = nnx.Param(jnp.where(jnp.arange(config.padded_vocab) < config.vocab, kernel, 0))


class Decoder(nnx.Module):
    """A decoder-only transformer. Weights are float32 here; `initialized` casts them."""

    adapter = None  # what the adapters of all layers share, where they share anything
    prompt = None  # virtual tokens in front of every document (`adapters/prompt.py`)
    prefix_length = 0  # how many tokens' keys stand in front of every document: their positions come first

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.embed = Embed(config, rngs=rngs)
        self.segments = nnx.Dict(
            {
                str(number): nnx.Dict(
                    {
                        str(place): Stack(config, kind=kind, repeats=repeats, rngs=rngs)
                        for place, kind in enumerate(pattern)
                    }
                )
                for number, (pattern, repeats) in enumerate(config.segments)
            }
        )
        self.final_norm = norm(config, config.embed)
        self.head = None if config.tied_embeddings else Head(config, rngs=rngs)
        self.config = config

    def hidden(self, tokens: jax.Array, ctx: Context) -> tuple[jax.Array, Cache | None]:
        """tokens [batch, sequence] -> what the head reads [batch, sequence, embed], and the entries for the cache.

        Entries are shaped like the cache, with these tokens only; None where `ctx` has no cache.
        """
        if self.adapter is not None:
            ctx = dataclasses.replace(ctx, shared_matrices=self.adapter())
        if self.prompt is not None and ctx.prefix is None:
            ctx = dataclasses.replace(ctx, prefix=self.prefix(ctx))
        ctx = dataclasses.replace(ctx, positions=ctx.positions + self.prefix_length)
        x, entries = self._run_segments(self.embed(tokens, ctx), ctx)
        return self.final_norm(x), None if ctx.cache is None else entries

    def prefix(self, ctx: Context) -> Cache:
        """Keys and values of the prompt's virtual tokens in all layers: what `ctx.prefix` holds."""
        return self.keys_and_values(self.prompt(), ctx)

    def keys_and_values(self, rows: jax.Array, ctx: Context) -> Cache:
        """Keys and values [repeats, tokens, kv_heads, head_dim] of a document that begins with table rows `rows`.

        `rows` are [tokens, embed], whether the table has them or not. They are few: every device computes them all.
        """
        count = len(rows)
        alone = Context(
            positions=jnp.arange(count)[None],
            index=jnp.arange(count, dtype=jnp.int32),
            shared_matrices=ctx.shared_matrices,
            remat=ctx.remat,
            compute_dtype=ctx.compute_dtype,
        )
        alone = dataclasses.replace(alone, cache=empty_cache(self.config, rows=1, capacity=count, ctx=alone))
        x = self.embed.block_input(rows[None].astype(ctx.compute_dtype), alone)
        _, entries = self._run_segments(x, alone)
        return jax.tree.map(lambda leaf: leaf[:, 0], entries)

    def _run_segments(self, x: jax.Array, ctx: Context) -> tuple[jax.Array, Cache]:
        """x [batch, sequence, embed] through all blocks, and their entries."""
        ctx = dataclasses.replace(ctx, rotations=make_rotations(self.config, ctx.positions))
        loop = jax.lax.scan if self.config.scan else unrolled_scan
        entries, first = {}, 0
        for number, (pattern, repeats) in enumerate(self.config.segments):
            stacks = [self.segments[str(number)][str(place)] for place in range(len(pattern))]
            own = (part_of(whole, str(number), len(pattern)) for whole in (ctx.cache, ctx.prefix))
            layers = first + np.arange(repeats * len(pattern)).reshape(repeats, len(pattern))
            x, entries[str(number)] = run_segment(stacks, x, ctx, *own, layers=layers, loop=loop)
            first += layers.size
        return x, entries

    def head_kernel(self, dtype: Any) -> jax.Array:
        """[embed, padded_vocab]; the transposed embedding of a tied model."""
        weight = self.embed.table().T if self.head is None else self.head.kernel[...]
        return weight.astype(dtype)


def part_of(cache: Cache | None, segment: str, places: int) -> list[Any]:
    """What `cache` has of a segment: one {"k", "v"} a place, or None."""
    return [None] * places if cache is None else cache[segment]


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
    """Run a pattern, one stack a place, over its repeats by `loop` (`jax.lax.scan`, or one like it).

    `layers` [repeats, places] are the blocks' numbers in the model, which number dropout keys. `cache` and `prefix`
    have one {"k", "v"} a place, stacked like the weights, or None; so have the entries that come back.
    """
    graphs, weights = zip(*(nnx.split(stack.block) for stack in stacks), strict=True)

    def pattern(x: jax.Array, this: tuple[Any, Any, Any, jax.Array]) -> tuple[jax.Array, list[Any]]:
        entries = []
        for graph, part, own, before, layer in zip(graphs, *this, strict=True):
            x, new = run_block(graph, part, x, layer_context(ctx, layer, own, before))
            entries.append(new)
        return x, entries

    return loop(pattern, x, (weights, cache, prefix, layers))


def unrolled_scan(body: Callable[..., Any], carry: Any, inputs: Any) -> tuple[Any, Any]:
    """`jax.lax.scan` without the loop: one copy of the body a step, which XLA:CPU runs 15-25 % faster."""
    # Split and not indexed: the gradient of one split is one concatenation, that of n indexings n padded sums.
    leaves, tree = jax.tree.flatten(inputs)
    steps = leaves[0].shape[0]
    parts = [[part.squeeze(0) for part in jax.lax.split(leaf, (1,) * steps)] for leaf in leaves]
    outputs = []
    for step in range(steps):
        carry, output = body(carry, jax.tree.unflatten(tree, [part[step] for part in parts]))
        outputs.append(output)
    return carry, jax.tree.map(lambda *each: jnp.stack(each), *outputs)


def run_block(graph: Any, weights: Any, x: jax.Array, ctx: Context) -> tuple[jax.Array, Any]:
    """One block under the memory policy `ctx.remat`."""

    def block(weights: Any, x: jax.Array) -> tuple[jax.Array, Any]:
        return nnx.merge(graph, weights)(x, ctx)

    return ctx.remat(block)(weights, x)


def layer_context(ctx: Context, layer: jax.Array, cache: Any = None, prefix: Any = None) -> Context:
    """The context as block number `layer` sees it: with its own dropout keys and its own part of cache and prefix."""
    keys = ctx.dropout_keys
    if keys is not None:
        keys = jax.vmap(lambda key: jax.random.fold_in(key, layer))(keys)
    return dataclasses.replace(ctx, cache=cache, prefix=prefix, dropout_keys=keys)


def decoder_graphdef(config: ModelConfig, insert_modules: Callable[[Decoder], None] = lambda decoder: None) -> Any:
    """The model's structure without its weights: what `nnx.merge` puts parameters into. Allocates nothing.

    `adapted` puts into a decoder what is to stand beside its own weights.
    """
    found = []

    def build() -> Params:
        decoder = Decoder(config, rngs=nnx.Rngs(params=jax.random.key(0)))
        insert_modules(decoder)
        definition, state = nnx.split(decoder)
        found.append(definition)
        return nnx.to_pure_dict(state)

    jax.eval_shape(build)
    return found[0]


def initial_params(config: ModelConfig, key: jax.Array, dtype: Any = jnp.float32) -> Params:
    """Fresh parameters as nested dicts. Trace it under `jax.jit` with `out_shardings` to be born sharded."""
    state = nnx.to_pure_dict(nnx.state(Decoder(config, rngs=nnx.Rngs(params=key))))
    return jax.tree.map(lambda leaf: leaf.astype(dtype), state)
