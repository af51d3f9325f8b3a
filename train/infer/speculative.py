"""Speculative decoding: a small model drafts some tokens, a large one reads them at once and keeps what it would say.

    q_i     what the draft says after the tokens before x_i, which is drawn from it
    p_i     what the target says there; one pass of it says all of them, and one more behind the last
    x_i     is kept with probability min(1, p_i(x_i) / q_i(x_i)), up to the first that is not; in its place comes a
            token drawn from max(p_i - q_i, 0), scaled up to 1, and where all were kept one more from p

So what is written is drawn as the target alone draws it, and at temperature 0 is what the target alone writes.
Source: Fast Inference from Transformers via Speculative Decoding, arXiv:2211.17192, algorithm 1. Tokens a pass of the
target are its block efficiency, as arXiv:2411.11055 reports it. One text at a time: rows would wait for each other.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from ...configs.errors import UserError
from ...configs.sections.model import ModelConfig
from ...models import kv_cache as caches
from ...models.attention.blockwise import BLOCKWISE
from ...models.attention.dense import DENSE
from ...models.context import Context
from ...models.decoder import Decoder
from ..engine.program import Program
from .generate import forward_logits, check, inference_context, pad_prompts, cast_weights, context_at
from .sampling import Sampling, probabilities, text_keys


class Writer(NamedTuple):
    """A model that writes."""

    program: Program
    weights: Any  # all that its forward pass reads


class Spoken(NamedTuple):
    """What was written, and what it took."""

    texts: list[list[int]]  # the tokens that follow each prompt
    tokens: int  # that came of passes of the target
    passes: int  # of the target, without those over the prompts
    kept: int  # drafted tokens
    examined: int  # drafted tokens up to the first of a pass that was not kept, which counts

    @property
    def acceptance(self) -> float:
        """How often the target keeps a drafted token, if it kept those before it."""
        return self.kept / max(self.examined, 1)

    @property
    def block_efficiency(self) -> float:
        """Tokens a pass of the target."""
        return self.tokens / max(self.passes, 1)


def speculate(
    target: Writer,
    draft: Writer,
    prompts: Sequence[Sequence[int]],
    *,
    ahead: int,
    max_tokens: int,
    sampling: Sampling,
    eos: int | None,
    key: jax.Array,
) -> Spoken:
    """Continue each prompt by `max_tokens` tokens, or fewer where `eos` (not included) came first.

    The draft is `ahead` tokens ahead. Both programs are on one device. Raises UserError as `generate` does.
    """
    if ahead < 1:
        raise UserError(f"ahead: {ahead} leaves the draft nothing to say; use at least 1")
    programs = target.program, draft.program
    for program in programs:
        check(prompts, program.config.model, max_tokens=max_tokens + ahead)
    run = speaker(
        tuple((program.graph, program.config.model, program.config.precision.compute) for program in programs),
        target.program.mesh,
        ahead=ahead,
        max_tokens=max_tokens,
        sampling=sampling,
        eos=eos,
    )
    texts, counts = [], np.zeros(4, np.int64)
    for prompt, own in zip(prompts, text_keys(key, prompts), strict=True):
        tokens, lengths = pad_prompts([prompt], multiple=1)
        with jax.set_mesh(target.program.mesh):
            said, *numbers = jax.device_get(run(target.weights, draft.weights, tokens, lengths, own))
        row = said[:max_tokens].tolist()
        texts.append(row[: row.index(eos)] if eos in row else row)
        counts += np.array(numbers)
    return Spoken(texts, *counts.tolist())


class Half(NamedTuple):
    """One of the two models, as the loop uses it."""

    decoder: Decoder
    ctx: Context


class Spoke(NamedTuple):
    """What the loop carries; a text's newest token is in no cache."""

    tokens: jax.Array  # [1, width + max_tokens + ahead]
    end: jax.Array  # tokens there are
    caches: tuple[caches.Cache, caches.Cache]
    ended: jax.Array  # whether eos was drawn
    counts: jax.Array  # [4]: tokens, passes, kept, examined


@functools.lru_cache(maxsize=16)
def speaker(
    models: tuple[tuple[Any, ModelConfig, str], ...],
    mesh: Mesh,
    *,
    ahead: int,
    max_tokens: int,
    sampling: Sampling,
    eos: int | None,
) -> Callable[..., tuple[jax.Array, ...]]:
    """run(target, draft, tokens [1, width], length [1], key) -> tokens, and the counts of `Spoken`; compiled.

    `models` are the target's and the draft's structure, model and dtype.
    """

    def run(target: Any, draft: Any, tokens: jax.Array, length: jax.Array, key: jax.Array) -> tuple[jax.Array, ...]:
        width = tokens.shape[1]
        first = width - length[:, None]
        halves = [half(*one, weights, mesh=mesh) for one, weights in zip(models, (target, draft), strict=True)]

        def round(state: Spoke) -> Spoke:
            keys = jax.random.split(jax.random.fold_in(key, state.counts[1]))
            text, q, cache = drafted(halves[1], state, ahead=ahead, first=first, sampling=sampling, key=keys[0])
            index = state.end - 1 + jnp.arange(ahead + 1)
            here = context_at(halves[0].ctx, attention=DENSE, index=index, first=first, cache=state.caches[0])
            scores, read = forward_logits(halves[0].decoder, text[:, index], here, last=ahead + 1)
            guesses = text[0, index[1:]]
            kept, token = verified(probabilities(scores[0], sampling=sampling), q, guesses, keys[1])
            text = text.at[0, state.end + kept].set(token)
            return told(state._replace(tokens=text, caches=(read, cache)), kept, ahead=ahead, eos=eos)

        room = jnp.zeros((1, max_tokens + ahead), tokens.dtype)
        filled = tuple(prefilled(one, tokens, first=first, capacity=width + room.shape[1]) for one in halves)
        begun = Spoke(jnp.concatenate([tokens, room], 1), jnp.int32(width), filled, jnp.array(False), jnp.zeros(4, int))
        going_on = lambda state: (state.end < width + max_tokens) & ~state.ended
        done = jax.lax.while_loop(going_on, round, begun)
        return done.tokens[0, width:], *done.counts

    return jax.jit(run)


def half(graph: Any, model: ModelConfig, compute: str, weights: Any, *, mesh: Mesh) -> Half:
    """A model with its weights, and what its blocks are told."""
    del model  # tells programs apart
    ctx = inference_context(mesh, compute=jnp.dtype(compute))
    decoder = nnx.merge(graph, cast_weights(weights, ctx.compute_dtype))
    return Half(decoder, ctx if decoder.prompt is None else dataclasses.replace(ctx, prefix=decoder.prefix(ctx)))


def prefilled(one: Half, tokens: jax.Array, *, first: jax.Array, capacity: int) -> caches.Cache:
    """The cache after a prompt."""
    empty = caches.empty_cache(one.decoder.config, rows=1, capacity=capacity, ctx=one.ctx)
    index = jnp.arange(tokens.shape[1])
    here = context_at(one.ctx, attention=BLOCKWISE, index=index, first=first, cache=empty)
    return forward_logits(one.decoder, tokens, here, last=1)[1]


def drafted(
    draft: Half, state: Spoke, *, ahead: int, first: jax.Array, sampling: Sampling, key: jax.Array
) -> tuple[jax.Array, jax.Array, caches.Cache]:
    """The text with `ahead` more tokens, what the draft drew each from [ahead, vocab], and its cache."""

    def one(carry: tuple[jax.Array, caches.Cache], number: jax.Array) -> tuple[Any, jax.Array]:
        text, cache = carry
        index = (state.end - 1 + number)[None]
        here = context_at(draft.ctx, attention=DENSE, index=index, first=first, cache=cache)
        scores, cache = forward_logits(draft.decoder, text[:, index], here, last=1)
        q = probabilities(scores[0, 0], sampling=sampling)
        token = jax.random.categorical(jax.random.fold_in(key, number), jnp.log(q))
        return (text.at[0, index[0] + 1].set(token.astype(text.dtype), mode="drop"), cache), q

    # Once more than there are tokens to draft: the last of them may be kept, and then the cache must have it.
    (text, cache), q = jax.lax.scan(one, (state.tokens, state.caches[1]), jnp.arange(ahead + 1))
    return text, q[:ahead], cache


def verified(p: jax.Array, q: jax.Array, guesses: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """How many of `guesses` [ahead], drawn from q [ahead, vocab], p [ahead + 1, vocab] keeps; the token behind."""
    ahead, keys = len(guesses), jax.random.split(key)
    said = [jnp.take_along_axis(each[:ahead], guesses[:, None], axis=-1)[:, 0] for each in (p, q)]
    keep = jax.random.uniform(keys[0], (ahead,)) * said[1] < said[0]
    kept = jnp.cumprod(keep.astype(jnp.int32)).sum()
    rest = jnp.maximum(p - jnp.concatenate([q, jnp.zeros_like(p[:1])]), 0)[kept]
    return kept, jax.random.categorical(keys[1], jnp.log(rest)).astype(guesses.dtype)


def told(state: Spoke, kept: jax.Array, *, ahead: int, eos: int | None) -> Spoke:
    """`state` after a pass that kept so many tokens and added one; what follows `eos` counts for nothing."""
    new = kept + 1
    if eos is not None:
        block = jax.lax.dynamic_slice_in_dim(state.tokens[0], state.end, ahead + 1)
        ends = (block == eos) & (jnp.arange(ahead + 1) < new)
        new = jnp.where(ends.any(), jnp.argmax(ends) + 1, new)
        state = state._replace(ended=ends.any())
    counts = jnp.stack([new, jnp.ones_like(new), jnp.minimum(kept, new), jnp.minimum(kept + (kept < ahead), new)])
    return state._replace(end=state.end + kept + 1, counts=state.counts + counts)
