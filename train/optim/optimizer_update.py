"""How a gradient becomes the next parameters: after its norm is known, or before it and validated by it.

    update(gradient, state, norm, healthy) -> Updated(params, opt_state, metrics)

`guarded` waits: clipping needs the global norm, and whether anything is applied at all (`healthy`) does as well, so no
weight moves before every device, and in a pipeline every stage, has said how large its gradient is.

`post_validated` does not wait. It applies the update as if nothing were clipped or skipped, while the norm is on its
way; then the norm validates what was done. Where something was to be clipped or skipped, the guess is dropped and the
guarded update is made of the old parameters: rolled back and done again, so that the result is that of `guarded` in any
case. Nothing has to be computed backwards, and any optimizer will do, since the old state is there until the guess
stands; it is what this costs. Source: "bypassing optimizer synchronizations" in Zero Bubble Pipeline Parallelism,
arXiv:2401.10241, section 4. There a stage updates in place and undoes it by arithmetic, so it looks at the norms of the
stages before it, to undo less often; here a guess that is dropped costs the same whoever knew, and none looks.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ...parallel.state import TrainState


class UpdateResult(NamedTuple):
    """The state after an update, as far as an optimizer moves it."""

    params: Any
    opt_state: Any
    metrics: dict[str, jax.Array]


# (gradient, state, the gradient's global norm, whether to apply anything)
Update = Callable[[Any, TrainState, jax.Array, jax.Array], UpdateResult]


def skip_if_unhealthy(optimizer: optax.GradientTransformation) -> Update:
    """The optimizer's update where `healthy`; elsewhere parameters and optimizer state stay as they are."""

    def update(gradient: Any, state: TrainState, norm: jax.Array, healthy: jax.Array) -> UpdateResult:
        del norm
        new = apply_optimizer(optimizer, gradient, state)
        old = (state.params, state.opt_state)
        return UpdateResult(*jax.tree.map(lambda applied, kept: jnp.where(healthy, applied, kept), new, old), {})

    return update


def post_validated(
    optimizer: optax.GradientTransformation, optimistic: optax.GradientTransformation, *, clip: float | None
) -> Update:
    """`guarded(optimizer)` that begins before the norm is known, as `optimistic`: `optimizer` without its clipping.

    The metric `rolled_back` is 1 where the guess did not stand.
    """
    certain = skip_if_unhealthy(optimizer)
    limit = jnp.inf if clip is None else clip

    def update(gradient: Any, state: TrainState, norm: jax.Array, healthy: jax.Array) -> UpdateResult:
        # Made here and not in the branch; leaf by leaf, since some wait for less than others.
        guess = jax.tree.map(jax.lax.optimization_barrier, apply_optimizer(optimistic, gradient, state))
        stands = healthy & (norm < limit)

        def again() -> tuple[Any, Any]:
            return certain(gradient, state, norm, healthy)[:2]

        return UpdateResult(*jax.lax.cond(stands, lambda: guess, again), {"rolled_back": (~stands).astype(jnp.float32)})

    return update


def apply_optimizer(optimizer: optax.GradientTransformation, gradient: Any, state: TrainState) -> tuple[Any, Any]:
    """Parameters and optimizer state after one update."""
    updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
    return optax.apply_updates(state.params, updates), opt_state
