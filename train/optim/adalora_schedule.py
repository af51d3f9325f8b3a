"""AdaLoRA: A and B stay nearly orthogonal, and a budget of ranks goes to the modules where they matter most.

An adapter is A diag(e) B. A triplet is column i of A, the singular value e_i, and row i of B.

    every step     gradient of A, B += orthogonality * that of the mean of |A^T A - 1| and |B B^T - 1| over all matrices
                   importance of each number w with gradient g: I = mean |w g|, U = mean ||w g| - I|, moving averages
    every `every`  e_i = 0 for all but the most important triplets, as many as the budget allows. The importance of a
                   triplet is I U of e_i plus the means of I U over column i of A and over row i of B
    in the end     the remaining triplets stay

The budget falls as a cubic from adapter.rank to adapter.budget.rank a module, on average over all modules. Source:
arXiv:2303.10512, equations 5 and 7 to 12, algorithm 1. PEFT reads the weights one step later than the gradient.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ...configs.sections.adapter import AdapterConfig, BudgetConfig
from ...models.adapters.attach import flatten, unflatten

AdaptedLayers = Mapping[str, np.ndarray]  # path of each e -> [layers] bool: the layers of the stack with an adapter

SMOOTHING = 0.85  # of both moving averages; beta 1 and 2 of the paper


class RanksState(NamedTuple):
    """The statistics that decide which triplets stay."""

    count: jax.Array  # int32: updates done
    importance: Any  # I, like the parameters
    uncertainty: Any  # U, like the parameters
    kept: Any  # like each e: 1 for an entry that stays


def rank_allocator(
    optimizer: optax.GradientTransformation, adapter: AdapterConfig, *, present: AdaptedLayers, steps: int
) -> optax.GradientTransformation:
    """`optimizer` of adapters whose ranks are allocated in a run of `steps`; its state gets an entry `ranks`."""
    budget, end, modules = adapter.budget, steps - adapter.budget.settled, count_adapted(present)

    def init(params: Any) -> dict[str, Any]:
        # Two trees of zeros, because every array of a state is donated.
        importance, uncertainty = (optax.tree.zeros_like(params, dtype=jnp.float32) for _ in range(2))
        kept = unflatten(
            {
                path: jnp.broadcast_to(jnp.asarray(present[path], jnp.float32)[:, None], leaf.shape)
                for path, leaf in singular_values(params).items()
            }
        )
        ranks = RanksState(jnp.zeros((), jnp.int32), importance, uncertainty, kept)
        return optimizer.init(params) | {"ranks": ranks}

    def update(gradient: Any, state: dict[str, Any], params: Any) -> tuple[Any, dict[str, Any]]:
        inner_state = dict(state)
        ranks: RanksState = inner_state.pop("ranks")
        penalty_gradient = jax.grad(orthogonality_penalty)(params, present=present)
        gradient = jax.tree.map(lambda g, p: g + budget.orthogonality * p, gradient, penalty_gradient)
        updates, inner_state = optimizer.update(gradient, inner_state, params)
        step = ranks.count + 1
        sensitivity = jax.tree.map(lambda w, g: jnp.abs(w * g), params, gradient)
        importance = optax.incremental_update(sensitivity, ranks.importance, 1 - SMOOTHING)
        deviation = jax.tree.map(lambda s, mean: jnp.abs(s - mean), sensitivity, importance)
        uncertainty = optax.incremental_update(deviation, ranks.uncertainty, 1 - SMOOTHING)
        total_rank = jnp.round(modules * scheduled_rank(step, adapter.rank, budget, end=end)).astype(jnp.int32)
        scores = jax.tree.map(jnp.multiply, importance, uncertainty)
        best = most_important(scores, present=present, total_rank=total_rank)
        allocates = ((step > budget.after) & (step % budget.every == 0) & (step <= end)) | (step == end)
        kept = jax.tree.map(lambda new, old: jnp.where(allocates, new, old), best, ranks.kept)
        # Between two allocations a pruned entry may grow again, as in the paper, so that its importance is measured.
        prunes, keeps, weights = allocates | (step > end), flatten(kept), flatten(params)
        pruned = {
            path: jnp.where(prunes & (keeps[path] == 0), -weights[path], update) if path in keeps else update
            for path, update in flatten(updates).items()
        }
        return unflatten(pruned), inner_state | {"ranks": RanksState(step, importance, uncertainty, kept)}

    return optax.GradientTransformation(init, update)


def singular_values(tree: Any) -> dict[str, jax.Array]:
    """Path -> e [layers, rank] of each stack of adapted modules."""
    return {path: leaf for path, leaf in flatten(tree).items() if path.endswith("/e")}


def count_adapted(present: AdaptedLayers) -> int:
    """Count the modules that have an adapter."""
    return sum(int(layers.sum()) for layers in present.values())


def orthogonality_penalty(params: Any, *, present: AdaptedLayers) -> jax.Array:
    """How far A and B of the adapted modules are from orthogonal: the mean of |A^T A - 1| and |B B^T - 1|."""
    total, leaves = jnp.zeros(()), flatten(params)
    for path, e in singular_values(params).items():
        layers, rank = e.shape
        a = leaves[f"{path[:-1]}a"].reshape(layers, -1, rank)
        b = leaves[f"{path[:-1]}b"].reshape(layers, rank, -1)
        for gram in (jnp.einsum("lir,lis->lrs", a, a), jnp.einsum("lro,lso->lrs", b, b)):
            squares = jnp.square(gram - jnp.eye(rank)).sum(axis=(1, 2))
            total += (jnp.sqrt(jnp.maximum(squares, 1e-12)) * present[path]).sum()
    return total / (2 * count_adapted(present))


def scheduled_rank(step: jax.Array, initial_rank: int, budget: BudgetConfig, *, end: int) -> jax.Array:
    """The mean rank of a module after update `step`, counted from 1: equation 12."""
    progress = jnp.clip((step - budget.after) / (end - budget.after), 0, 1)
    return budget.rank + (initial_rank - budget.rank) * (1 - progress) ** 3


def most_important(scores: Any, *, present: AdaptedLayers, total_rank: jax.Array) -> Any:
    """For each e, 1 for the entries of the `total_rank` most important triplets of all modules, else 0.

    `scores` are I U of all leaves.
    """
    leaves, triplet_scores = flatten(scores), {}
    for path, e in singular_values(scores).items():
        a, b = leaves[f"{path[:-1]}a"], leaves[f"{path[:-1]}b"]
        triplets = e + a.mean(axis=tuple(range(1, a.ndim - 1))) + b.mean(axis=tuple(range(2, b.ndim)))
        triplet_scores[path] = jnp.where(present[path][:, None], triplets, -1)  # below all scores of adapters
    joined = jnp.concatenate([triplets.reshape(-1) for triplets in triplet_scores.values()])
    position = jnp.argsort(jnp.argsort(-joined, stable=True), stable=True)
    mask, start = {}, 0
    for path, triplets in triplet_scores.items():
        selected = position[start : start + triplets.size] < total_rank
        mask[path] = selected.astype(jnp.float32).reshape(triplets.shape)
        start += triplets.size
    return unflatten(mask)
