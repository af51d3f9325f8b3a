"""One training step as a composition of functions: recipe -> loss -> gradient engine -> optimizer.

step(state, batch) -> (state, metrics)
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ...parallel.gradients import Batch, Engine, Sums
from ...parallel.state import TrainState
from ..optim.optimizer_chain import mean_gradient_norm
from ..optim.optimizer_update import Update

Step = Callable[..., tuple[TrainState, dict[str, jax.Array]]]  # (state, batch, first_row=0) -> (state, metrics)
ApplyUpdate = Callable[[Sums, TrainState], tuple[TrainState, dict[str, jax.Array]]]  # -> (state, metrics)


def no_extra_inputs(state: TrainState) -> dict[str, Any]:
    """Extra engine inputs derived from the state. This default has none."""
    del state
    return {}


def make_step(
    engine: Engine,
    apply_update: ApplyUpdate,
    *,
    dropout: bool,
    extra_inputs: Callable[[TrainState], dict[str, Any]] = no_extra_inputs,
    row_ids: Callable[[], jax.Array] | None = None,
) -> Step:
    """Return a pure step: `engine` sums up a batch, `apply_update` turns the sums into the next state.

    `extra_inputs(state)` are further keyword arguments of the engine. `row_ids()` [rows] seed dropout; None: row i of
    the batch has id i. `first_row` is added to them, for a batch that is a part of the global batch.
    """

    def step(state: TrainState, batch: Batch, first_row: Any = 0) -> tuple[TrainState, dict[str, jax.Array]]:
        rows = jnp.arange(batch["tokens"].shape[0]) if row_ids is None else row_ids()
        keys = dropout_row_keys(state, rows=first_row + rows) if dropout else None
        return apply_update(engine(state.params, state.frozen, batch, keys, **extra_inputs(state)), state)

    return step


def make_update(update: Update, *, schedule: optax.Schedule, spike: float | None) -> ApplyUpdate:
    """Return a function that divides the sums of a batch by their weight and makes the optimizer's update.

    The update is skipped if loss or gradient norm is not finite, or if the norm exceeds `spike` x its running mean.
    """

    def apply_update(sums: Sums, state: TrainState) -> tuple[TrainState, dict[str, jax.Array]]:
        weight = jnp.maximum(sums.weight, 1e-9)
        gradient = jax.tree.map(lambda leaf: leaf.astype(jnp.float32) / weight, sums.gradient)
        norm = optax.global_norm(gradient)
        healthy = jnp.isfinite(norm) & jnp.isfinite(sums.loss)
        if spike is not None:
            healthy &= norm < spike * mean_gradient_norm(state.opt_state)
        new = update(gradient, state, norm, healthy)
        metrics = {
            "loss": sums.loss / weight,
            "tokens": sums.weight,
            "grad_norm": norm,
            "learning_rate": schedule(state.step),
            "skipped": ~healthy,
            **{name: value / weight for name, value in sums.metrics.items()},
            **new.metrics,
        }
        # A skipped update still counts as a step, so that the run goes on to the next batch.
        return dataclasses.replace(state, step=state.step + 1, params=new.params, opt_state=new.opt_state), metrics

    return apply_update


def dropout_row_keys(state: TrainState, *, rows: jax.Array) -> jax.Array:
    """Return one key for each row id, so what a row draws depends on no mesh, microbatch or process count."""
    key = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
    return jax.vmap(jax.random.fold_in, (None, 0))(key, rows)
