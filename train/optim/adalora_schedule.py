"""AdaLoRA's part in the update: A and B stay near orthogonal, and the budget of ranks goes to where it matters.

    every step     gradient of A, B += orthogonality * that of the mean of |A^T A - 1| and |B B^T - 1| over all matrices
                   importance of each number w with gradient g: I = mean |w g|, U = mean ||w g| - I|, moving averages
    every `every`  e_i = 0 for all but the budget's most important triplets: of I U of e_i, and the means of I U over
                   column i of A and row i of B
    in the end     the triplets that are left stay

The budget falls as a cubic from adapter.rank to adapter.budget.rank a map, on the average over all maps. Source:
arXiv:2303.10512, equations 5 and 7 to 12, algorithm 1. PEFT looks at the weights one step later than at the gradient.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ...configs.sections.adapter import AdapterConfig, BudgetConfig
from ...models.adapters.attach import flatten, unflatten

AdaptedLayers = Mapping[str, np.ndarray]  # path of each e -> [layers] bool: which layers of the stack have an adapter

SMOOTHING = 0.85  # of both moving averages, the paper's beta 1 and 2


class RanksState(NamedTuple):
    """What decides which triplets stay."""

    count: jax.Array  # int32: updates done
    importance: Any  # I, like the parameters
    uncertainty: Any  # U, like the parameters
    kept: Any  # of each e, 1 where an entry stays


def rank_allocator(
    optimizer: optax.GradientTransformation, adapter: AdapterConfig, *, present: AdaptedLayers, steps: int
) -> optax.GradientTransformation:
    """`optimizer` of the leaves of the adapted maps, in a run of `steps`; its state gets an entry `ranks`."""
    budget, end, maps = adapter.budget, steps - adapter.budget.settled, count_adapted(present)

    def init(params: Any) -> dict[str, Any]:
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), params)
        # Made twice: every array of a state is donated.
        again = jax.tree.map(jnp.zeros_like, zeros)
        kept = {
            path: jnp.broadcast_to(jnp.asarray(present[path], jnp.float32)[:, None], leaf.shape)
            for path, leaf in singular_values(params).items()
        }
        return optimizer.init(params) | {"ranks": RanksState(jnp.zeros((), jnp.int32), zeros, again, unflatten(kept))}

    def update(gradient: Any, state: dict[str, Any], params: Any) -> tuple[Any, dict[str, Any]]:
        ranks, own = state["ranks"], {name: part for name, part in state.items() if name != "ranks"}
        pull = jax.grad(orthogonality_penalty)(params, present=present)
        gradient = jax.tree.map(lambda g, p: g + budget.orthogonality * p, gradient, pull)
        updates, own = optimizer.update(gradient, own, params)
        step = ranks.count + 1
        now = jax.tree.map(lambda w, g: jnp.abs(w * g), params, gradient)
        importance = optax.incremental_update(now, ranks.importance, 1 - SMOOTHING)
        apart = jax.tree.map(lambda one, mean: jnp.abs(one - mean), now, importance)
        uncertainty = optax.incremental_update(apart, ranks.uncertainty, 1 - SMOOTHING)
        left = jnp.round(maps * scheduled_rank(step, adapter.rank, budget, end=end)).astype(jnp.int32)
        best = most_important(jax.tree.map(jnp.multiply, importance, uncertainty), present=present, budget=left)
        due = ((step > budget.after) & (step % budget.every == 0) & (step <= end)) | (step == end)
        kept = jax.tree.map(lambda new, old: jnp.where(due, new, old), best, ranks.kept)
        cutting, stays, whole = due | (step > end), flatten(kept), flatten(params)
        # Between two times an entry may grow again, as in the paper: importance is of what might be.
        cut = {
            path: jnp.where(cutting & (stays[path] == 0), -whole[path], update) if path in stays else update
            for path, update in flatten(updates).items()
        }
        return unflatten(cut), own | {"ranks": RanksState(step, importance, uncertainty, kept)}

    return optax.GradientTransformation(init, update)


def singular_values(tree: Any) -> dict[str, jax.Array]:
    """Path -> e [layers, rank] of each stack of maps."""
    return {path: leaf for path, leaf in flatten(tree).items() if path.endswith("/e")}


def count_adapted(present: AdaptedLayers) -> int:
    """Maps that have an adapter."""
    return sum(int(own.sum()) for own in present.values())


def orthogonality_penalty(params: Any, *, present: AdaptedLayers) -> jax.Array:
    """How far A and B of the adapted maps are from orthogonal: the mean of |A^T A - 1| and |B B^T - 1|."""
    total, leaves = jnp.zeros(()), flatten(params)
    for path, e in singular_values(params).items():
        layers, rank = e.shape
        a = leaves[f"{path[:-1]}a"].reshape(layers, -1, rank)
        b = leaves[f"{path[:-1]}b"].reshape(layers, rank, -1)
        for gram in (jnp.einsum("lir,lis->lrs", a, a), jnp.einsum("lro,lso->lrs", b, b)):
            squares = jnp.square(gram - jnp.eye(rank)).sum(axis=(1, 2))
            total += (jnp.sqrt(jnp.maximum(squares, 1e-12)) * present[path]).sum()
    return total / (2 * count_adapted(present))


def scheduled_rank(step: jax.Array, first: int, budget: BudgetConfig, *, end: int) -> jax.Array:
    """Ranks a map that are left after update number `step`, counted from 1: equation 12."""
    done = jnp.clip((step - budget.after) / (end - budget.after), 0, 1)
    return budget.rank + (first - budget.rank) * (1 - done) ** 3


def most_important(scores: Any, *, present: AdaptedLayers, budget: jax.Array) -> Any:
    """Of each e, 1 for its entries that are among the `left` best triplets of all maps. `scores` has all leaves."""
    leaves, every = flatten(scores), {}
    for path, e in singular_values(scores).items():
        a, b = leaves[f"{path[:-1]}a"], leaves[f"{path[:-1]}b"]
        every[path] = e + a.mean(axis=tuple(range(1, a.ndim - 1))) + b.mean(axis=tuple(range(2, b.ndim)))
        every[path] = jnp.where(present[path][:, None], every[path], -1)  # behind all that are there
    joined = jnp.concatenate([score.reshape(-1) for score in every.values()])
    place = jnp.argsort(jnp.argsort(-joined, stable=True), stable=True)
    found, start = {}, 0
    for path, score in every.items():
        found[path] = (place[start : start + score.size] < budget).astype(jnp.float32).reshape(score.shape)
        start += score.size
    return unflatten(found)
