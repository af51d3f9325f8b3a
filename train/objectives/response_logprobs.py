"""Whole answers out of a batch of packed rows: the idea all recipes that compare answers rest on.

A pair is two segments of one row, 1 and 2, or 3 and 4, ...: neither packing nor microbatches nor meshes take them
apart. So an answer's log-probability is a sum over a segment, and everything else is arithmetic on [rows, pairs, 2].
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Responses(NamedTuple):
    """The two answers of each pair; [rows, pairs, 2], and zeros where a row has fewer pairs than would fit."""

    logprob: jax.Array  # sum of log p over what is learned of the answer
    tokens: jax.Array  # how many tokens that are
    exists: jax.Array  # [rows, pairs] float32: 1 where there is a pair

    @property
    def mean(self) -> jax.Array:
        """Mean log p of an answer's tokens."""
        return self.logprob / jnp.maximum(self.tokens, 1)


def response_logprobs(token_logprobs: jax.Array, batch: dict[str, jax.Array]) -> Responses:
    """Sums over segments of log p [rows, sequence]."""
    weights = batch["loss_weights"]
    tokens = sum_by_pair(weights, batch["segment_ids"])
    return Responses(
        sum_by_pair(weights * token_logprobs, batch["segment_ids"]),
        tokens,
        (tokens > 0).all(axis=-1).astype(jnp.float32),
    )


def sum_by_pair(values: jax.Array, segment_ids: jax.Array) -> jax.Array:
    """Sums of `values` [rows, sequence] over segments, as [rows, pairs, 2]; segment 0 is padding."""
    rows, length = values.shape
    most = length // 2  # a segment has a token at least
    sums = jax.vmap(lambda row, ids: jax.ops.segment_sum(row, ids, num_segments=2 * most + 1))(values, segment_ids)
    return sums[:, 1:].reshape(rows, most, 2)


def implicit_rewards(token_logprobs: jax.Array, batch: dict[str, jax.Array]) -> jax.Array:
    """log p - log p of the reference, of each answer: [rows, pairs, 2]."""
    change = batch["loss_weights"] * (token_logprobs - batch["reference_logprobs"])
    return sum_by_pair(change, batch["segment_ids"])
