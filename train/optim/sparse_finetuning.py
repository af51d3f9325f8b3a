"""Sparse fine-tuning: the first updates search for the few elements of the chosen weights that are trained afterwards.

An element's score in these `adapter.scouting` updates is

    fishmask   the sum of its squared gradients; no weight changes                               arXiv:2111.09839
    lottery    how far it moves when all elements train; then all get their first values back    arXiv:2110.07560

The `adapter.density` of all elements with the largest scores are trained, and all extra weights, which a recipe adds.
The mask is part of the optimizer state, so a resumed run keeps it. During the search fishmask's gradient is the square
root of the sum of squared gradients of single examples (`train/engine/fisher.py`).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ...configs.sections.adapter import AdapterConfig
from ...models.adapters.selection import RECIPE_WEIGHTS
from ...parallel.sharding import map_with_path
from ...parallel.state import TrainState


class ElementsState(NamedTuple):
    """The mask of trained elements, and what decides it."""

    count: jax.Array  # int32: updates done
    score: Any  # like the parameters: sums of squares of fishmask, first weights of lottery
    kept: Any  # like the parameters: 1 for an element that is trained


def masked_optimizer(
    optimizer: optax.GradientTransformation,
    adapter: AdapterConfig,
    *,
    scale: Callable[[str, jax.Array], jax.Array] | None = None,
) -> optax.GradientTransformation:
    """`optimizer` of a few elements; its state gets an entry `elements`.

    `scale(path, array)` is zero in the layers of a stack that are not trained at all.
    """
    rewinds = adapter.method == "lottery"

    def init(params: Any) -> dict[str, Any]:
        score = jax.tree.map(lambda leaf: leaf.astype(jnp.float32) * (1.0 if rewinds else 0.0), params)
        kept = map_with_path(
            lambda path, leaf: jnp.full(leaf.shape, rewinds or is_extra_weight(path), jnp.float32), params
        )
        return optimizer.init(params) | {"elements": ElementsState(jnp.zeros((), jnp.int32), score, kept)}

    def make_mask(scores: Any) -> Any:
        def maskable(path: str, leaf: jax.Array) -> jax.Array:
            if is_extra_weight(path):
                return jnp.zeros_like(leaf)
            return leaf if scale is None else scale(path, leaf)

        total = count_true(map_with_path(lambda path, leaf: maskable(path, jnp.ones_like(leaf)) > 0, scores))
        mask = top_k_mask(map_with_path(maskable, scores), count=jnp.maximum(1, jnp.round(adapter.density * total)))
        return map_with_path(lambda path, leaf: jnp.ones_like(leaf) if is_extra_weight(path) else leaf, mask)

    def update(gradient: Any, state: dict[str, Any], params: Any) -> tuple[Any, dict[str, Any]]:
        inner_state = dict(state)
        elements: ElementsState = inner_state.pop("elements")
        step = elements.count + 1
        searching, last = step <= adapter.scouting, step == adapter.scouting
        masked = jax.tree.map(jnp.multiply, gradient, elements.kept)
        updates, inner_state = optimizer.update(masked, inner_state, params)
        updates = jax.tree.map(jnp.multiply, updates, elements.kept)
        if rewinds:
            score = elements.score  # the first weights
            distance = jax.tree.map(lambda w, u, first: jnp.abs(w + u - first), params, updates, score)
            # Also in every later step, because the first difference may round, and the second does not.
            rewound = jax.tree.map(lambda kept: last | (~searching & (kept == 0)), elements.kept)
            updates = jax.tree.map(lambda u, w, first, at: jnp.where(at, first - w, u), updates, params, score, rewound)
            # The optimizer starts anew, except for the learning rate: its schedule is that of the whole run.
            fresh_state = optimizer.init(params) | {"learning_rate": inner_state["learning_rate"]}
            inner_state = jax.tree.map(lambda new, old: jnp.where(last, new, old), fresh_state, inner_state)
            kept = jax.lax.cond(last, lambda: make_mask(distance), lambda: elements.kept)
        else:
            score = jax.tree.map(lambda s, g: jnp.where(searching, s + jnp.square(g), s), elements.score, gradient)
            kept = jax.lax.cond(last, lambda: make_mask(score), lambda: elements.kept)
        return updates, inner_state | {"elements": ElementsState(step, score, kept)}

    return optax.GradientTransformation(init, update)


def mask_is_final(state: TrainState, *, adapter: AdapterConfig) -> jax.Array:
    """Whether the search is over."""
    return state.opt_state["elements"].count >= adapter.scouting


def is_extra_weight(path: str) -> bool:
    """Whether a recipe added the weight at `path` to the model: it is always trained, and no mask covers it."""
    return path.startswith(RECIPE_WEIGHTS)


def count_true(flags: Any) -> jax.Array:
    """Count the true elements of all leaves, float32. Only rows are counted in int32, which could not hold the sum."""
    return sum(leaf.sum(-1, dtype=jnp.int32).astype(jnp.float32).sum() for leaf in jax.tree.leaves(flags))


def top_k_mask(scores: Any, *, count: jax.Array | int) -> Any:
    """1 for the `count` largest of all scores, which must not be negative, else 0; equal scores get the same.

    The limit is found bit by bit, in 31 sums over all elements: floats that are not negative order like their bits.
    """
    bits = jax.tree.map(lambda leaf: jax.lax.bitcast_convert_type(leaf.astype(jnp.float32), jnp.int32), scores)

    def try_bit(number: jax.Array, limit: jax.Array) -> jax.Array:
        higher = limit | (1 << (30 - number))
        above = count_true(jax.tree.map(lambda leaf: leaf >= higher, bits))
        return jnp.where(above >= count, higher, limit)

    limit = jax.lax.fori_loop(0, 31, try_bit, jnp.int32(0))
    return jax.tree.map(lambda leaf: (leaf >= jnp.maximum(limit, 1)).astype(jnp.float32), bits)
