"""Continuing texts: one pass over the prompts fills a cache of keys and values, then a loop adds a token at a time.

    generate(program, params, [[0, 52, 7]], max_tokens=64, sampling=GREEDY, eos=0, key=key) -> [[31, 4, ...]]

Prompts of different lengths end together: shorter ones begin with padding, a document of its own (segment 0) that
nothing else sees. Rows are spread over `data` and `fsdp`, heads and vocabulary over `tensor`; the sequence is whole on
every device, so a mesh with `seq` repeats the work along it. Prefill and loop are one program, compiled once for a
model, a mesh, a sampling and a shape.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ...configs.errors import UserError
from ...configs.sections.model import ModelConfig
from ...models import kv_cache as caches
from ...models.attention.blockwise import BLOCKWISE
from ...models.attention.dense import DENSE
from ...models.attention.interface import Implementation, attend
from ...models.context import Context, flat_linear
from ...models.decoder import Decoder
from ...parallel.sharding import constrainer, path_name
from ...parallel.vocabulary import compute_logits, embedding_lookup
from ..engine.program import Program
from .sampling import Sampling, sample, text_keys

# A prompt's width is rounded up to a multiple of this: one program serves prompts of similar length.
WIDTH = 16


def generate(
    program: Program,
    params: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    sampling: Sampling,
    eos: int | None,
    key: jax.Array,
) -> list[list[int]]:
    """The tokens that follow each prompt: `max_tokens` of them, or fewer where `eos` (not included) came first.

    `params` are all weights the forward pass reads, sharded as the program shards them. `key` and a prompt decide its
    text, whatever is generated beside it. Raises UserError on an empty prompt, on ids the model has no row for, and on
    texts longer than learned positions reach.
    """
    model, mesh = program.config.model, program.mesh
    check(prompts, model, max_tokens=max_tokens)
    if not prompts:
        return []
    tokens, lengths = pad_prompts(prompts, multiple=mesh.shape["data"] * mesh.shape["fsdp"])
    # Key data and in numpy: every process hands over the same values, and none of them is on one of its devices.
    keys = np.asarray(jax.random.key_data(text_keys(key, [*prompts, *[()] * (len(tokens) - len(prompts))])))
    compute = program.config.precision.compute
    run = compiled_generator(program.graph, model, mesh, compute=compute, max_tokens=max_tokens, sampling=sampling, eos=eos)
    with jax.set_mesh(mesh):
        rows = np.asarray(run(params, tokens, lengths, keys))[: len(prompts)].tolist()
    return [row[: row.index(eos)] if eos in row else row for row in rows]


def check(prompts: Sequence[Sequence[int]], model: ModelConfig, *, max_tokens: int) -> None:
    """Raise UserError where a prompt cannot be continued."""
    if max_tokens < 1:
        raise UserError(f"max_tokens: {max_tokens} adds nothing; use at least 1")
    for number, prompt in enumerate(prompts):
        if not len(prompt):
            raise UserError(f"prompts: number {number} has {len(prompt)} tokens; begin it with the tokenizer's bos")
        if not 0 <= min(prompt) <= max(prompt) < model.vocab:
            raise UserError(
                f"prompts: number {number} has ids from {min(prompt)} to {max(prompt)}, but model.vocab is "
                f"{model.vocab}; use the tokenizer the model was trained with"
            )
        if model.position_encoding == "learned" and len(prompt) + max_tokens > model.max_positions:
            raise UserError(
                f"prompts: number {number} has {len(prompt)} tokens and max_tokens is {max_tokens}, more than "
                f"model.max_positions ({model.max_positions}) learned positions; shorten one of them"
            )


def pad_prompts(prompts: Sequence[Sequence[int]], *, multiple: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [rows, width] with zeros on the left, and lengths [rows]; rows of length 0 fill up to `multiple`."""
    rows = -(-len(prompts) // multiple) * multiple
    width = -(-max(map(len, prompts)) // WIDTH) * WIDTH
    tokens, lengths = np.zeros((rows, width), np.int32), np.zeros(rows, np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, width - len(prompt) :] = prompt
        lengths[row] = len(prompt)
    return tokens, lengths


class Written(NamedTuple):
    """What the loop carries."""

    count: jax.Array  # tokens drawn so far, by every row
    tokens: jax.Array  # [rows, max_tokens]
    ended: jax.Array  # [rows]: has drawn eos, or was no prompt to begin with
    cache: caches.Cache  # of all tokens but the newest


@functools.lru_cache(maxsize=16)
def compiled_generator(
    graph: Any,
    model: ModelConfig,
    mesh: Mesh,
    *,
    compute: str,
    max_tokens: int,
    sampling: Sampling,
    eos: int | None,
) -> Callable[..., jax.Array]:
    """run(params, tokens [rows, width], lengths [rows], keys [rows, ...]) -> tokens [rows, max_tokens], compiled.

    `keys` are key data. The token after i others is drawn with `fold_in(key, i)`; what a row holds after `eos` is void.
    """
    told = inference_context(mesh, compute=jnp.dtype(compute))

    def run(params: Any, tokens: jax.Array, lengths: jax.Array, keys: jax.Array) -> jax.Array:
        (rows, width), keys = tokens.shape, jax.random.wrap_key_data(keys)
        decoder = nnx.merge(graph, cast_weights(params, told.compute))
        ctx = told if decoder.prompt is None else dataclasses.replace(told, prefix=decoder.prefix(told))
        first = width - lengths[:, None]

        def drawn(scores: jax.Array, written: Written) -> Written:
            """One more token a row, from its `scores` [rows, vocab]."""
            step = jax.vmap(jax.random.fold_in, (0, None))(keys, written.count)
            token = sample(scores, step, sampling=sampling)
            ended = written.ended if eos is None else written.ended | (token == eos)
            return Written(written.count + 1, written.tokens.at[:, written.count].set(token), ended, written.cache)

        def another(written: Written) -> Written:
            newest = jax.lax.dynamic_slice_in_dim(written.tokens, written.count - 1, 1, axis=1)
            index = (width + written.count - 1)[None]
            here = context_at(ctx, attention=DENSE, index=index, first=first, cache=written.cache)
            scores, cache = next_scores(decoder, newest, here)
            return drawn(scores, written._replace(cache=cache))

        empty = caches.empty_cache(model, rows=rows, capacity=width + max_tokens, ctx=ctx)
        here = context_at(ctx, attention=BLOCKWISE, index=jnp.arange(width), first=first, cache=empty)
        scores, cache = next_scores(decoder, tokens, here)
        nothing = Written(jnp.int32(0), jnp.zeros((rows, max_tokens), jnp.int32), lengths == 0, cache)
        going_on = lambda written: (written.count < max_tokens) & ~written.ended.all()
        return jax.lax.while_loop(going_on, another, drawn(scores, nothing)).tokens

    return jax.jit(run, out_shardings=NamedSharding(mesh, PartitionSpec()))


def inference_context(mesh: Mesh, *, compute: Any) -> Context:
    """What every forward pass on `mesh` is told; `standing` adds where its tokens are.

    The sequence stays in one piece: a step of the loop has a single token to share out.
    """
    place = constrainer(mesh)

    def constrain(x: jax.Array, names: tuple[str | None, ...]) -> jax.Array:
        return place(x, tuple(None if name in ("sequence", "block_sequence") else name for name in names))

    return Context(
        positions=jnp.zeros((1, 1), jnp.int32),
        linear=flat_linear,
        lookup=partial(embedding_lookup, constrain=constrain),
        constrain=constrain,
        compute_dtype=compute,
    )


def context_at(
    ctx: Context, *, attention: Implementation, index: jax.Array, first: jax.Array, cache: caches.Cache
) -> Context:
    """`ctx` for tokens at `index` [tokens] of every row, where rows begin at `first` [rows, 1]."""
    slots = jnp.arange(caches.capacity(cache))
    return dataclasses.replace(
        ctx,
        attend=partial(attend, attention),
        positions=jnp.maximum(index - first, 0),
        segment_ids=(index >= first).astype(jnp.int32),
        index=index.astype(jnp.int32),
        cache=cache,
        cache_segment_ids=(slots >= first).astype(jnp.int32),
    )


def next_scores(decoder: Decoder, tokens: jax.Array, ctx: Context) -> tuple[jax.Array, caches.Cache]:
    """Logits after the last of `tokens` [rows, tokens], float32 [rows, vocab], and the cache with all of them in it."""
    scores, cache = forward_logits(decoder, tokens, ctx, last=1)
    return scores[:, 0], cache


def forward_logits(decoder: Decoder, tokens: jax.Array, ctx: Context, *, last: int) -> tuple[jax.Array, caches.Cache]:
    """Logits after each of the `last` of `tokens` [rows, tokens], float32 [rows, last, vocab], and the cache."""
    model = decoder.config
    hidden, entries = decoder.hidden(tokens, ctx)
    kernel, constrain = decoder.head_kernel(ctx.compute_dtype), ctx.constrain
    scores = compute_logits(
        hidden[:, -last:], kernel, vocab=model.vocab, softcap=model.logit_softcap, constrain=constrain
    )
    return scores[..., : model.vocab], caches.write_entries(ctx.cache, entries, index=ctx.index[0])


def cast_weights(params: Any, dtype: Any) -> Any:
    """`params` with everything in `dtype` that a forward pass rounds to it at every use; norms stay as they are."""

    def one(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        return leaf.astype(dtype) if path_name(path).endswith(("/kernel", "/embedding")) else leaf

    return jax.tree_util.tree_map_with_path(one, params)
