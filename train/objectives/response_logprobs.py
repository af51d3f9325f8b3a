"""Log-probabilities of whole responses in a batch of packed rows, for all recipes that compare responses.

A pair is two segments of one row, 1 and 2, or 3 and 4, ...: packing, microbatches and meshes never separate them. So a
response's log-probability is a sum over a segment, and everything else is arithmetic on [rows, pairs, 2].
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class ResponsePairs(NamedTuple):
    """The two responses of each pair: [rows, pairs, 2], and zeros in rows with fewer pairs than would fit."""

    logprobs: jax.Array  # sum of weight * log p over the tokens of a response
    tokens: jax.Array  # sum of weights
    pair_exists: jax.Array  # [rows, pairs] float32: 1 where there is a pair

    @property
    def mean_logprobs(self) -> jax.Array:
        """Mean log p over the tokens of a response."""
        return self.logprobs / jnp.maximum(self.tokens, 1)


def response_logprobs(token_logprobs: jax.Array, batch: dict[str, jax.Array]) -> ResponsePairs:
    """Sum log p [rows, sequence] over the segments of each pair."""
    weights, segments = batch["loss_weights"], batch["segment_ids"]
    logprobs, tokens = sum_by_response(weights * token_logprobs, segments), sum_by_response(weights, segments)
    return ResponsePairs(logprobs, tokens, (tokens > 0).all(axis=-1).astype(jnp.float32))


def sum_by_response(values: jax.Array, segment_ids: jax.Array) -> jax.Array:
    """Sum `values` [rows, sequence] over segments: [rows, pairs, 2]. Segment 0 is padding."""
    rows, length = values.shape
    max_pairs = length // 2  # a segment has at least one token
    sums = jax.vmap(lambda row, ids: jax.ops.segment_sum(row, ids, num_segments=2 * max_pairs + 1))(values, segment_ids)
    return sums[:, 1:].reshape(rows, max_pairs, 2)


def implicit_rewards(token_logprobs: jax.Array, batch: dict[str, jax.Array]) -> jax.Array:
    """log p of each response minus its log p under the reference model: [rows, pairs, 2]."""
    change = batch["loss_weights"] * (token_logprobs - batch["reference_logprobs"])
    return sum_by_response(change, batch["segment_ids"])
