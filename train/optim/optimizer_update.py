"""From a gradient to the next parameters: after its norm is known, or before it and validated by it.

    update(gradient, state, norm, healthy) -> UpdateResult(params, opt_state, metrics)

`skip_nonfinite_or_spiking` waits for the global norm: clipping needs it, and so does the decision whether to apply the
update at all (`healthy`). So no weight changes before the norms of all devices and all pipeline stages are known.

`post_validated` does not wait. It makes the update as if nothing were clipped or skipped, while the norm is computed.
Then the norm validates this optimistic update. If something had to be clipped or skipped, the update is dropped and
made again from the old parameters, so the result is always that of `skip_nonfinite_or_spiking`. This works with any
optimizer; its price is that the old state is kept until the update is validated. Source: "bypassing optimizer
synchronizations" in Zero Bubble Pipeline Parallelism, arXiv:2401.10241, section 4. There a stage updates in place and
reverts by arithmetic; it reads the norms of the stages before it in order to revert less often. Here a dropped update
costs the same in any case, so no stage reads them.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ...parallel.state import TrainState


class UpdateResult(NamedTuple):
    """The parts of the state that an optimizer changes."""

    params: Any
    opt_state: Any
    metrics: dict[str, jax.Array]


# (gradient, state, global norm of the gradient, whether to apply the update)
Update = Callable[[Any, TrainState, jax.Array, jax.Array], UpdateResult]


def skip_nonfinite_or_spiking(optimizer: optax.GradientTransformation) -> Update:
    """The optimizer's update if `healthy`; else parameters and optimizer state do not change."""

    def update(gradient: Any, state: TrainState, norm: jax.Array, healthy: jax.Array) -> UpdateResult:
        del norm
        new = apply_optimizer(optimizer, gradient, state)
        old = (state.params, state.opt_state)
        return UpdateResult(*jax.tree.map(lambda new, old: jnp.where(healthy, new, old), new, old), {})

    return update


def post_validated(
    optimizer: optax.GradientTransformation, optimistic: optax.GradientTransformation, *, clip: float | None
) -> Update:
    """`skip_nonfinite_or_spiking(optimizer)` that starts before the norm is known, with `optimistic`: without clipping.

    The metric `rolled_back` is 1 if the optimistic update was dropped.
    """
    validated = skip_nonfinite_or_spiking(optimizer)
    limit = jnp.inf if clip is None else clip

    def update(gradient: Any, state: TrainState, norm: jax.Array, healthy: jax.Array) -> UpdateResult:
        # The barriers keep it out of the branch. One for each leaf, because some leaves are ready before others.
        new = jax.tree.map(jax.lax.optimization_barrier, apply_optimizer(optimistic, gradient, state))
        valid = healthy & (norm < limit)
        result = jax.lax.cond(valid, lambda: new, lambda: validated(gradient, state, norm, healthy)[:2])
        return UpdateResult(*result, {"rolled_back": (~valid).astype(jnp.float32)})

    return update


def apply_optimizer(optimizer: optax.GradientTransformation, gradient: Any, state: TrainState) -> tuple[Any, Any]:
    """Return parameters and optimizer state after one update."""
    updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
    return optax.apply_updates(state.params, updates), opt_state
