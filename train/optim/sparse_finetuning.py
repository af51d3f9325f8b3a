"""Selective by element: the first updates find the few elements of the chosen weights that learn, the others rest.

    fishmask   their squared gradients, added up over these updates, in which nothing moves      arXiv:2111.09839
    lottery    how far training all of them moved each; then all go back to where they were      arXiv:2110.07560

The `adapter.density` largest of all elements together learn, and all of what a recipe adds of its own. Which, is part
of the optimizer's state, so a run that goes on keeps them. In these updates fishmask's gradient is the root of what the
squares of its examples' gradients add up to (`examples.py`).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ...configs.sections.adapter import AdapterConfig
from ...models.adapters.selection import RECIPE_WEIGHTS
from ...parallel.sharding import path_name
from ...parallel.state import TrainState


class ElementsState(NamedTuple):
    """Which elements learn, and what decides it."""

    count: jax.Array  # int32: updates done
    score: Any  # like the parameters: fishmask's sums of squares, lottery's first weights
    kept: Any  # like the parameters: 1 where an element learns, in the end


def masked_optimizer(
    optimizer: optax.GradientTransformation,
    adapter: AdapterConfig,
    *,
    scale: Callable[[str, jax.Array], jax.Array] | None = None,
) -> optax.GradientTransformation:
    """`optimizer` of a few elements; its state gets an entry `elements`.

    `chosen(path, array)` is zero in the layers of a stack that do not learn at all.
    """
    goes_back = adapter.method == "lottery"

    def init(params: Any) -> dict[str, Any]:
        score = jax.tree.map(lambda leaf: leaf.astype(jnp.float32) * (1.0 if goes_back else 0.0), params)
        kept = map_with_path(
            lambda path, leaf: jnp.full(leaf.shape, goes_back or is_extra_weight(path), jnp.float32), params
        )
        return optimizer.init(params) | {"elements": ElementsState(jnp.zeros((), jnp.int32), score, kept)}

    def found(score: Any) -> Any:
        def own(path: str, leaf: jax.Array) -> jax.Array:
            if is_extra_weight(path):
                return jnp.zeros_like(leaf)
            return leaf if scale is None else scale(path, leaf)

        total = count_true(map_with_path(lambda path, leaf: own(path, jnp.ones_like(leaf)) > 0, score))
        best = top_k_mask(map_with_path(own, score), count=jnp.maximum(1, jnp.round(adapter.density * total)))
        return map_with_path(lambda path, leaf: jnp.ones_like(leaf) if is_extra_weight(path) else leaf, best)

    def update(gradient: Any, state: dict[str, Any], params: Any) -> tuple[Any, dict[str, Any]]:
        elements, old = state["elements"], {name: part for name, part in state.items() if name != "elements"}
        step = elements.count + 1
        searching, last = step <= adapter.scouting, step == adapter.scouting
        updates, own = optimizer.update(jax.tree.map(jnp.multiply, gradient, elements.kept), old, params)
        updates = jax.tree.map(jnp.multiply, updates, elements.kept)
        if goes_back:
            score = elements.score
            moved = jax.tree.map(lambda w, u, first: jnp.abs(w + u - first), params, updates, score)
            # Again in every later step: the first difference may round, the second does not.
            home = jax.tree.map(lambda kept: last | (~searching & (kept == 0)), elements.kept)
            updates = jax.tree.map(lambda u, w, first, at: jnp.where(at, first - w, u), updates, params, score, home)
            # It begins again, but for the learning rate, which the whole run has one schedule of.
            again = optimizer.init(params) | {"learning_rate": own["learning_rate"]}
            own = jax.tree.map(lambda new, now: jnp.where(last, new, now), again, own)
            kept = jax.lax.cond(last, lambda: found(moved), lambda: elements.kept)
        else:
            score = jax.tree.map(lambda s, g: jnp.where(searching, s + jnp.square(g), s), elements.score, gradient)
            kept = jax.lax.cond(last, lambda: found(score), lambda: elements.kept)
        return updates, own | {"elements": ElementsState(step, score, kept)}

    return optax.GradientTransformation(init, update)


def mask_is_final(state: TrainState, *, adapter: AdapterConfig) -> jax.Array:
    """Whether the elements that learn are found."""
    return state.opt_state["elements"].count >= adapter.scouting


def map_with_path(change: Callable[[str, jax.Array], jax.Array], tree: Any) -> Any:
    """`change(path, leaf)` of each leaf of `tree`."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: change(path_name(path), leaf), tree)


def is_extra_weight(path: str) -> bool:
    """Whether the weight at `path` is none of the model's, so that it is not chosen among but learns."""
    return path.startswith(RECIPE_WEIGHTS)


def count_true(flags: Any) -> jax.Array:
    """How many elements of all leaves of `flags` are true, float32: rows in int32, which holds no larger sum."""
    return sum(leaf.sum(-1, dtype=jnp.int32).astype(jnp.float32).sum() for leaf in jax.tree.leaves(flags))


def top_k_mask(scores: Any, *, count: jax.Array | int) -> Any:
    """1 for the `count` largest of all scores, which are not negative, and 0 for the others; equal ones stay together.

    The limit is found bit by bit, in 31 sums over all elements: floats that are not negative order as their bits do.
    """
    bits = jax.tree.map(lambda leaf: jax.lax.bitcast_convert_type(leaf.astype(jnp.float32), jnp.int32), scores)

    def narrower(number: jax.Array, limit: jax.Array) -> jax.Array:
        higher = limit | (1 << (30 - number))
        there = count_true(jax.tree.map(lambda leaf: leaf >= higher, bits))
        return jnp.where(there >= count, higher, limit)

    limit = jax.lax.fori_loop(0, 31, narrower, jnp.int32(0))
    return jax.tree.map(lambda leaf: (leaf >= jnp.maximum(limit, 1)).astype(jnp.float32), bits)
