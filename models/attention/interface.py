"""The interface of attention: softmax(scores) @ v with its log-sum-exp, and one rule to differentiate it.

    scores = softcap(scale * q @ k^T), -inf where the query may not see the key
    lse    = log(sum over keys of exp(scores))          the log-sum-exp, always float32
    out    = exp(scores - lse) @ v

An `Implementation` has a forward and a backward function, and a third that names what it cannot do. The backward pass
is FlashAttention-2's: it computes the probabilities from the *global* log-sum-exp and not from its own keys, so that a
caller may pass the keys block by block (ring attention) and add up the gradients:

    p = exp(scores - lse)      delta = rowsum(d_out * out)      d_scores = p * (d_out @ v^T - delta)

Shapes: q, out [batch, queries, heads, head_dim]; k, v [batch, keys, kv_heads, head_dim], heads a multiple of kv_heads
and query head h reading key head h // (heads // kv_heads); lse [batch, queries, heads]. A query that sees no key at all
has out 0, lse -inf and no gradient. Source: FlashAttention-2, arXiv:2307.08691, section 3.1.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
from jax.ad_checkpoint import checkpoint_name

from ...configs.errors import UserError


@dataclass(frozen=True)
class Mask:
    """The settings of attention that are fixed when a program is compiled."""

    causal: bool = True
    """A query sees keys up to its own index."""
    window: int | None = None
    """Tokens a query sees, itself included: key j is visible to query i if and only if 0 <= i - j < window."""
    softcap: float | None = None
    """Scores become softcap * tanh(scores / softcap) before anything is hidden."""
    scale: float | None = None
    """Factor of q @ k^T; None is head_dim ** -0.5."""

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise UserError(f"model.window: {self.window} hides every key; use at least 1, or none for no window")
        if self.softcap is not None and not self.softcap > 0:
            raise UserError(f"model.attention_softcap: {self.softcap} must be positive; use none for no cap")


ALL_SEGMENTS = -1  # segment id of a key that every document sees


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TokenIndices:
    """Index of each query and key in the unsharded sequence, and segment id of its document. All int32.

    With both indexes None, queries and keys are the same contiguous tokens, counted from 0, and an implementation may
    skip invisible blocks at compile time. Explicit indexes may be in any order: a zigzag slice, a key cache.
    """

    query_index: jax.Array | None = None  # [queries]
    key_index: jax.Array | None = None  # [keys]; given if and only if query_index is
    query_segments: jax.Array | None = None  # [batch, queries]; None is one document
    key_segments: jax.Array | None = None  # [batch, keys]; a query sees keys of its own segment and of ALL_SEGMENTS


class Implementation(NamedTuple):
    """One implementation of attention. `refuse` returns a reason, so that no combination is ever approximated."""

    name: str
    refuse: Callable  # mask, indices, q, k, platform -> reason or None; q and k need a shape and dtype
    forward: Callable  # q, k, v, mask, indices -> out, lse
    backward: Callable  # q, k, v, out, lse, d_out, mask, indices -> dq, dk, dv; out, lse over *all* keys
    needs_all_axes_manual: bool = False  # on a mesh: no axis left to the partitioner, which cannot split a TPU kernel


def never_refuse(mask: Mask, indices: TokenIndices, q, k, platform: str | None) -> None:
    """The `refuse` of an implementation that computes every mask, order and dtype on every device."""


def attend(
    implementation: Implementation,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: Mask,
    indices: TokenIndices = TokenIndices(),
) -> jax.Array:
    """Attention of q [batch, queries, heads, head_dim] over k, v [batch, keys, kv_heads, head_dim]; out is like q.

    The output and its log-sum-exp are named `attn_out` and `attn_lse`: under a memory policy that keeps q, k, v and
    both, the forward kernel does not run again. Raises UserError as `check`.
    """
    check(implementation, q, k, v, mask, indices)
    return _attend(implementation, mask, q, k, v, indices)


def check(
    implementation: Implementation, q, k, v, mask: Mask, indices: TokenIndices, *, platform: str | None = None
) -> None:
    """Raise UserError if shapes do not fit or `implementation` refuses; with `platform` None, whatever the device."""
    _check_shapes(q, k, v, indices)
    if reason := implementation.refuse(mask, indices, q, k, platform):
        raise UserError(f"model.attention: {implementation.name} {reason}; use blockwise, which has no such limit")


def _check_shapes(q, k, v, indices: TokenIndices) -> None:
    (batch, queries, heads, head_dim), (_, keys, kv_heads, _) = q.shape, k.shape
    if k.shape != v.shape or k.shape[0] != batch or k.shape[3] != head_dim:
        raise UserError(f"model.attention: q {q.shape}, k {k.shape} and v {v.shape} differ in batch, keys or head_dim")
    if heads % kv_heads:
        raise UserError(f"model.kv_heads: {kv_heads} does not divide {heads} heads; use a divisor of model.heads")
    expected = {
        "query_index": (queries,), "key_index": (keys,),
        "query_segments": (batch, queries), "key_segments": (batch, keys),
    }  # fmt: skip
    for name, shape in expected.items():
        array = getattr(indices, name)
        if array is not None and array.shape != shape:
            raise UserError(f"model.attention: {name} has shape {array.shape}, but q and k ask for {shape}")
    for kind in ("index", "segments"):
        if (getattr(indices, f"query_{kind}") is None) != (getattr(indices, f"key_{kind}") is None):
            raise UserError(f"model.attention: query_{kind} and key_{kind} go together, but one of them is None")


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(implementation, mask, q, k, v, indices):
    return implementation.forward(q, k, v, mask, indices)[0]


def _attend_forward(implementation, mask, q, k, v, indices):
    out, lse = implementation.forward(q, k, v, mask, indices)
    # Named inside the forward rule: outside of the custom VJP a policy cannot reach the log-sum-exp, and the output
    # saved there would not be the one that the backward pass reads.
    out, lse = checkpoint_name(out, "attn_out"), checkpoint_name(lse, "attn_lse")
    return out, (q, k, v, out, lse, indices)


def _attend_backward(implementation, mask, residuals, d_out):
    q, k, v, out, lse, indices = residuals
    return *implementation.backward(q, k, v, out, lse, d_out, mask, indices), None  # integers have no gradient


_attend.defvjp(_attend_forward, _attend_backward)
