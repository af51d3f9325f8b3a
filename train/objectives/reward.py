"""Reward model: one score for each response, read at its last token; the chosen response should score higher.

    -log sigmoid(score_w - score_l - margin)             Bradley-Terry; arXiv:2203.02155, equation 1, and 2307.09288

w is the chosen response, l the rejected one; the margin comes from the data, 0 if they have none. Accuracy is the share
of pairs whose chosen response scores higher.
"""

import jax
import jax.numpy as jnp

from .interface import Recipe
from .preference import margin
from .response_logprobs import response_logprobs, sum_by_response

Batch = dict[str, jax.Array]


def bradley_terry(scores: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """The loss above over scores [rows, sequence]: (sum over pairs, number of pairs)."""
    exists, margins = score_margins(scores, batch)
    target_margins = at_last_token(batch["labels"], batch)[..., 0]
    return jnp.where(exists > 0, -jax.nn.log_sigmoid(margins - target_margins), 0).sum(), exists.sum()


def accuracy(scores: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """(pairs whose chosen response scores higher, number of pairs)."""
    exists, margins = score_margins(scores, batch)
    return (exists * (margins > 0)).sum(), exists.sum()


def score_margins(scores: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """(1 where there is a pair, chosen response's score minus rejected one's), both [rows, pairs]."""
    return response_logprobs(scores, batch).pair_exists, margin(at_last_token(scores, batch))


def at_last_token(values: jax.Array, batch: Batch) -> jax.Array:
    """`values` [rows, sequence] at the last weighted token of each response: [rows, pairs, 2]."""
    length, segments = values.shape[1], batch["segment_ids"]
    weighted = batch["loss_weights"] > 0
    # Compare positions, not neighbours: if a mesh shards the sequence, tokens stand in another order.
    positions = jnp.where(weighted, batch["positions"], -1)
    last = jax.vmap(lambda row, ids: jax.ops.segment_max(row, ids, num_segments=length + 1)[ids])(positions, segments)
    return sum_by_response(jnp.where(weighted & (positions == last), values, 0), segments)


REWARD = Recipe(
    lambda config: bradley_terry,
    unit="pair",
    extra_fields=("labels",),
    uses_scores=True,
    measures={"accuracy": accuracy},
)
