"""Generation: one pass over the prompts (prefill) fills the key-value cache, then a loop adds a token at a time.

    generate(program, params, [[0, 52, 7]], max_tokens=64, sampling=GREEDY, eos=0, key=key) -> [[31, 4, ...]]

Prompts are padded on the left, so that all end at the same index; padding is a document of its own (segment 0), which
no other token attends to. Rows are sharded over `data` and `fsdp`, heads and vocabulary over `tensor`. The sequence is
not sharded, so a mesh with `seq` repeats the work along that axis. Prefill and loop are one program, compiled once for
a model, a mesh, a sampling and a shape.
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
from .sampling import Sampling, prompt_keys, sample

# The width of a batch of prompts is a multiple of this, so that one program serves prompts of similar lengths.
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
    """Return the tokens that follow each prompt: `max_tokens`, or fewer if `eos` (not included) comes first.

    `params` are all weights that the forward pass reads, sharded as the program shards them. A text depends on `key`
    and its prompt only, not on the other prompts. Raises UserError on an empty prompt, on ids outside the vocabulary,
    and on texts that are longer than learned positions reach.
    """
    mesh = program.mesh
    check_prompts(prompts, program.config.model, max_tokens=max_tokens)
    if not prompts:
        return []
    tokens, lengths = pad_prompts(prompts, multiple=mesh.shape["data"] * mesh.shape["fsdp"])
    # As key data in NumPy: every process passes the same values, which are on none of its devices yet.
    keys = np.asarray(jax.random.key_data(prompt_keys(key, [*prompts, *[()] * (len(tokens) - len(prompts))])))
    compute = program.config.precision.compute
    run = compiled_generator(program.graph, mesh, compute=compute, max_tokens=max_tokens, sampling=sampling, eos=eos)
    with jax.set_mesh(mesh):
        rows = np.asarray(run(params, tokens, lengths, keys))[: len(prompts)].tolist()
    return [row[: row.index(eos)] if eos in row else row for row in rows]


def check_prompts(prompts: Sequence[Sequence[int]], model: ModelConfig, *, max_tokens: int) -> None:
    """Raise UserError if a prompt cannot be continued."""
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
    """Return tokens [rows, width], padded on the left with zeros, and lengths [rows].

    The number of rows is a multiple of `multiple`; rows that are no prompt have length 0.
    """
    rows = -(-len(prompts) // multiple) * multiple
    width = -(-max(map(len, prompts)) // WIDTH) * WIDTH
    tokens, lengths = np.zeros((rows, width), np.int32), np.zeros(rows, np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, width - len(prompt) :] = prompt
        lengths[row] = len(prompt)
    return tokens, lengths


class LoopState(NamedTuple):
    """The carry of the generation loop."""

    count: jax.Array  # tokens generated so far, the same in every row
    tokens: jax.Array  # [rows, max_tokens]
    finished: jax.Array  # bool [rows]: the row has drawn eos, or is no prompt
    cache: caches.Cache  # of all tokens but the newest


class InferenceModel(NamedTuple):
    """A decoder with its weights, and the context of its forward passes, to which `context_at` adds the tokens'."""

    decoder: Decoder
    ctx: Context


@functools.lru_cache(maxsize=16)
def compiled_generator(
    graph: Any,
    mesh: Mesh,
    *,
    compute: str,
    max_tokens: int,
    sampling: Sampling,
    eos: int | None,
) -> Callable[..., jax.Array]:
    """Return a jitted run(params, tokens [rows, width], lengths [rows], keys [rows, ...]) -> tokens [rows, max_tokens].

    `keys` are key data. Token i of a row is drawn with `fold_in(key, i)`. Tokens after `eos` have no meaning.
    """

    def run(params: Any, tokens: jax.Array, lengths: jax.Array, keys: jax.Array) -> jax.Array:
        (rows, width), keys = tokens.shape, jax.random.wrap_key_data(keys)
        model = load_decoder(graph, params, mesh, compute=compute)
        first = width - lengths[:, None]

        def append_token(state: LoopState, logits: jax.Array) -> LoopState:
            """Draw a token for every row from `logits` [rows, 1, vocab]."""
            step_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, state.count)
            token = sample(logits[:, 0], step_keys, sampling=sampling)
            finished = state.finished if eos is None else state.finished | (token == eos)
            return LoopState(state.count + 1, state.tokens.at[:, state.count].set(token), finished, state.cache)

        def decode_step(state: LoopState) -> LoopState:
            newest = jax.lax.dynamic_slice_in_dim(state.tokens, state.count - 1, 1, axis=1)
            index = (width + state.count - 1)[None]
            ctx = context_at(model.ctx, attention=DENSE, index=index, first=first, cache=state.cache)
            logits, cache = forward_logits(model.decoder, newest, ctx, last=1)
            return append_token(state._replace(cache=cache), logits)

        logits, cache = prefill(model, tokens, first=first, capacity=width + max_tokens)
        start = LoopState(jnp.int32(0), jnp.zeros((rows, max_tokens), jnp.int32), lengths == 0, cache)
        unfinished = lambda state: (state.count < max_tokens) & ~state.finished.all()
        return jax.lax.while_loop(unfinished, decode_step, append_token(start, logits)).tokens

    return jax.jit(run, out_shardings=NamedSharding(mesh, PartitionSpec()))


def load_decoder(graph: Any, params: Any, mesh: Mesh, *, compute: str) -> InferenceModel:
    """Merge `params` into the decoder `graph`, rounded to the dtype `compute`, for inference on `mesh`."""
    constrain_all = constrainer(mesh)

    def constrain(x: jax.Array, names: tuple[str | None, ...]) -> jax.Array:
        # The sequence is not sharded: a step of the loop has one token of it.
        return constrain_all(x, tuple(None if name in ("sequence", "block_sequence") else name for name in names))

    ctx = Context(
        positions=jnp.zeros((1, 1), jnp.int32),
        linear=flat_linear,
        lookup=partial(embedding_lookup, constrain=constrain),
        constrain=constrain,
        compute_dtype=jnp.dtype(compute),
    )
    decoder = nnx.merge(graph, cast_weights(params, ctx.compute_dtype))
    return InferenceModel(
        decoder, ctx if decoder.prompt is None else dataclasses.replace(ctx, prefix=decoder.prefix(ctx))
    )


def prefill(
    model: InferenceModel, tokens: jax.Array, *, first: jax.Array, capacity: int
) -> tuple[jax.Array, caches.Cache]:
    """Return logits [rows, 1, vocab] after prompts `tokens` [rows, width], and a cache for `capacity` tokens a row."""
    rows, width = tokens.shape
    empty = caches.empty_cache(model.decoder.config, rows=rows, capacity=capacity, ctx=model.ctx)
    ctx = context_at(model.ctx, attention=BLOCKWISE, index=jnp.arange(width), first=first, cache=empty)
    return forward_logits(model.decoder, tokens, ctx, last=1)


def context_at(
    ctx: Context, *, attention: Implementation, index: jax.Array, first: jax.Array, cache: caches.Cache
) -> Context:
    """Return `ctx` for tokens at `index` [tokens] of every row, where row r begins at `first` [rows, 1]."""
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


def forward_logits(decoder: Decoder, tokens: jax.Array, ctx: Context, *, last: int) -> tuple[jax.Array, caches.Cache]:
    """Return float32 logits [rows, last, vocab] after the `last` ones of `tokens` [rows, tokens], and the new cache."""
    model = decoder.config
    hidden, entries = decoder.hidden(tokens, ctx)
    kernel, constrain = decoder.head_kernel(ctx.compute_dtype), ctx.constrain
    logits = compute_logits(
        hidden[:, -last:], kernel, vocab=model.vocab, softcap=model.logit_softcap, constrain=constrain
    )
    return logits[..., : model.vocab], caches.write_entries(ctx.cache, entries, index=ctx.index[0])


def cast_weights(params: Any, dtype: Any) -> Any:
    """Cast the leaves of `params` that a forward pass would cast to `dtype` at every use; norms keep their dtype."""

    def cast(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        return leaf.astype(dtype) if path_name(path).endswith(("/kernel", "/embedding")) else leaf

    return jax.tree_util.tree_map_with_path(cast, params)
