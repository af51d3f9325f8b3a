"""Reward model: a score of each answer, read at its last token, so that the better answer's is the higher one.

    -log sigmoid(score_w - score_l - margin)             Bradley-Terry; arXiv:2203.02155, equation 1, and 2307.09288

w is the better answer, l the worse; the margin is that of the data, 0 where they have none. Accuracy is the share of
pairs whose better answer scores higher.
"""

import jax
import jax.numpy as jnp

from ...configs.sections.recipe import RecipeConfig
from .interface import Loss, Recipe
from .response_logprobs import response_logprobs, sum_by_pair

Batch = dict[str, jax.Array]


def loss(config: RecipeConfig) -> Loss:
    """There is nothing to set."""
    del config

    def sums(scores: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
        exists, ahead = margins(scores, batch)
        wanted = at_last_token(batch["labels"], batch)[..., 0]
        return jnp.where(exists > 0, -jax.nn.log_sigmoid(ahead - wanted), 0).sum(), exists.sum()

    return sums


def accuracy(scores: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """How many better answers score higher, and how many pairs there are."""
    exists, ahead = margins(scores, batch)
    return (exists * (ahead > 0)).sum(), exists.sum()


def margins(scores: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """(whether there is a pair, by how much its better answer scores higher) [rows, pairs], of scores at each token."""
    found = at_last_token(scores, batch)
    return response_logprobs(scores, batch).exists, found[..., 0] - found[..., 1]


def at_last_token(values: jax.Array, batch: Batch) -> jax.Array:
    """`values` [rows, sequence] at the last token that is learned of each answer: [rows, pairs, 2]."""
    length, segments = values.shape[1], batch["segment_ids"]
    learned = batch["loss_weights"] > 0
    # By place and not by neighbour: where a mesh cuts the sequence, tokens lie in another order.
    place = jnp.where(learned, batch["positions"], -1)
    last = jax.vmap(lambda row, ids: jax.ops.segment_max(row, ids, num_segments=length + 1)[ids])(place, segments)
    return sum_by_pair(jnp.where(learned & (place == last), values, 0), segments)


REWARD = Recipe(loss, unit="pair", reads=("labels",), scored=True, measures={"accuracy": accuracy})
