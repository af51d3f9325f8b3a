"""Speculative decoding: a small draft model proposes tokens, and one pass of a large target model verifies them.

    q_i     the draft's distribution of token i; the proposal x_i is drawn from it
    p_i     the target's distribution of token i; one pass gives all of them, and the one after the last proposal
    x_i     is accepted with probability min(1, p_i(x_i) / q_i(x_i)), up to the first that is rejected; that one is
            replaced by a token from max(p_i - q_i, 0), normalized; if all are accepted, one more is drawn from p

So texts have the distribution of the target's own, and at temperature 0 they are the target's own.
Source: Fast Inference from Transformers via Speculative Decoding, arXiv:2211.17192, algorithm 1. Block efficiency is
tokens per pass of the target, as in arXiv:2411.11055. One text at a time, because rows of a batch would wait for each
other.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ...configs.errors import UserError
from ...models import kv_cache as caches
from ...models.attention.dense import DENSE
from ..engine.program import Program
from .generate import InferenceModel, check_prompts, context_at, forward_logits, load_decoder, pad_prompts, prefill
from .sampling import Sampling, probabilities, prompt_keys


class LoadedModel(NamedTuple):
    """A program with its weights."""

    program: Program
    weights: Any  # all that the forward pass reads


class SpeculationResult(NamedTuple):
    """Texts, and counts over all of them."""

    texts: list[list[int]]  # the tokens that follow each prompt
    tokens: int  # in the texts
    passes: int  # of the target, without prefill
    accepted: int  # draft tokens
    examined: int  # draft tokens that were accepted, or were the first of a pass to be rejected

    @property
    def acceptance(self) -> float:
        """How often the target accepts a draft token after it accepted those before it."""
        return self.accepted / max(self.examined, 1)

    @property
    def block_efficiency(self) -> float:
        """Tokens per pass of the target."""
        return self.tokens / max(self.passes, 1)


def speculate(
    target: LoadedModel,
    draft: LoadedModel,
    prompts: Sequence[Sequence[int]],
    *,
    draft_length: int,
    max_tokens: int,
    sampling: Sampling,
    eos: int | None,
    key: jax.Array,
) -> SpeculationResult:
    """Continue each prompt by `max_tokens` tokens, or fewer if `eos` (not included) comes first.

    The draft proposes `draft_length` tokens for each pass of the target. Both programs are on one device. Raises
    UserError as `generate` does.
    """
    if draft_length < 1:
        raise UserError(f"--ahead: {draft_length} draft tokens for a pass of the target; use at least 1")
    programs = target.program, draft.program
    for program in programs:
        check_prompts(prompts, program.config.model, max_tokens=max_tokens + draft_length)
    run = compiled_speculator(
        tuple((program.graph, program.config.precision.compute) for program in programs),
        target.program.mesh,
        draft_length=draft_length,
        max_tokens=max_tokens,
        sampling=sampling,
        eos=eos,
    )
    texts, counts = [], np.zeros(4, np.int64)
    for prompt, text_key in zip(prompts, prompt_keys(key, prompts), strict=True):
        tokens, lengths = pad_prompts([prompt], multiple=1)
        with jax.set_mesh(target.program.mesh):
            text, *text_counts = jax.device_get(run(target.weights, draft.weights, tokens, lengths, text_key))
        text = text[:max_tokens].tolist()
        texts.append(text[: text.index(eos)] if eos in text else text)
        counts += np.array(text_counts)
    return SpeculationResult(texts, *counts.tolist())


class LoopState(NamedTuple):
    """The carry of the loop over passes of the target. The newest token of the text is in no cache."""

    tokens: jax.Array  # [1, width + max_tokens + draft_length]
    end: jax.Array  # number of tokens so far
    caches: tuple[caches.Cache, caches.Cache]  # the target's and the draft's
    finished: jax.Array  # bool: eos was drawn
    counts: jax.Array  # [4]: tokens, passes, accepted, examined


@functools.lru_cache(maxsize=16)
def compiled_speculator(
    models: tuple[tuple[Any, str], ...],
    mesh: Mesh,
    *,
    draft_length: int,
    max_tokens: int,
    sampling: Sampling,
    eos: int | None,
) -> Callable[..., tuple[jax.Array, ...]]:
    """Return a jitted run(target, draft, tokens [1, width], length [1], key) -> tokens and `LoopState.counts`.

    `models` are (nnx graphdef, compute dtype) of the target and of the draft; run takes their weights.
    """

    def run(target: Any, draft: Any, tokens: jax.Array, length: jax.Array, key: jax.Array) -> tuple[jax.Array, ...]:
        width = tokens.shape[1]
        first = width - length[:, None]
        target_model, draft_model = (
            load_decoder(graph, weights, mesh, compute=compute)
            for (graph, compute), weights in zip(models, (target, draft), strict=True)
        )

        def target_pass(state: LoopState) -> LoopState:
            keys = jax.random.split(jax.random.fold_in(key, state.counts[1]))
            text, q, draft_cache = propose(
                draft_model, state, draft_length=draft_length, first=first, sampling=sampling, key=keys[0]
            )
            index = state.end - 1 + jnp.arange(draft_length + 1)
            ctx = context_at(target_model.ctx, attention=DENSE, index=index, first=first, cache=state.caches[0])
            logits, cache = forward_logits(target_model.decoder, text[:, index], ctx, last=draft_length + 1)
            proposals = text[0, index[1:]]
            accepted, token = verify_draft(probabilities(logits[0], sampling=sampling), q, proposals, keys[1])
            text = text.at[0, state.end + accepted].set(token)
            state = state._replace(tokens=text, caches=(cache, draft_cache))
            return advance(state, accepted, draft_length=draft_length, eos=eos)

        space = jnp.zeros((1, max_tokens + draft_length), tokens.dtype)
        text = jnp.concatenate([tokens, space], 1)
        filled = tuple(
            prefill(model, tokens, first=first, capacity=text.shape[1])[1] for model in (target_model, draft_model)
        )
        start = LoopState(text, jnp.int32(width), filled, jnp.array(False), jnp.zeros(4, int))
        unfinished = lambda state: (state.end < width + max_tokens) & ~state.finished
        state = jax.lax.while_loop(unfinished, target_pass, start)
        return state.tokens[0, width:], *state.counts

    return jax.jit(run)


def propose(
    draft: InferenceModel, state: LoopState, *, draft_length: int, first: jax.Array, sampling: Sampling, key: jax.Array
) -> tuple[jax.Array, jax.Array, caches.Cache]:
    """Return the text with `draft_length` more tokens, their distributions q [draft_length, vocab], and the cache."""

    def draft_step(carry: tuple[jax.Array, caches.Cache], number: jax.Array) -> tuple[Any, jax.Array]:
        text, cache = carry
        index = (state.end - 1 + number)[None]
        ctx = context_at(draft.ctx, attention=DENSE, index=index, first=first, cache=cache)
        logits, cache = forward_logits(draft.decoder, text[:, index], ctx, last=1)
        q = probabilities(logits[0, 0], sampling=sampling)
        token = jax.random.categorical(jax.random.fold_in(key, number), jnp.log(q))
        return (text.at[0, index[0] + 1].set(token.astype(text.dtype), mode="drop"), cache), q

    # One step more than there are proposals: the last proposal may be accepted, and then the cache must have it.
    (text, cache), q = jax.lax.scan(draft_step, (state.tokens, state.caches[1]), jnp.arange(draft_length + 1))
    return text, q[:draft_length], cache


def verify_draft(p: jax.Array, q: jax.Array, proposals: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return how many of `proposals` [draft_length] are accepted, and the token that follows them.

    `proposals` were drawn from q [draft_length, vocab]; the target's distributions are p [draft_length + 1, vocab].
    """
    length, keys = len(proposals), jax.random.split(key)
    p_x, q_x = (jnp.take_along_axis(probs[:length], proposals[:, None], axis=-1)[:, 0] for probs in (p, q))
    accept = jax.random.uniform(keys[0], (length,)) * q_x < p_x
    accepted = jnp.cumprod(accept.astype(jnp.int32)).sum()
    residual = jnp.maximum(p - jnp.concatenate([q, jnp.zeros_like(p[:1])]), 0)[accepted]
    return accepted, jax.random.categorical(keys[1], jnp.log(residual)).astype(proposals.dtype)


def advance(state: LoopState, accepted: jax.Array, *, draft_length: int, eos: int | None) -> LoopState:
    """Return `state` after a pass that accepted so many tokens and added one; tokens after `eos` are not counted."""
    new = accepted + 1
    if eos is not None:
        block = jax.lax.dynamic_slice_in_dim(state.tokens[0], state.end, draft_length + 1)
        is_eos = (block == eos) & (jnp.arange(draft_length + 1) < new)
        new = jnp.where(is_eos.any(), jnp.argmax(is_eos) + 1, new)
        state = state._replace(finished=is_eos.any())
    examined = accepted + (accepted < draft_length)
    counts = jnp.stack([new, jnp.ones_like(new), jnp.minimum(accepted, new), jnp.minimum(examined, new)])
    return state._replace(end=state.end + accepted + 1, counts=state.counts + counts)
