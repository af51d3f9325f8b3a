"""One optimizer step, as a composition of functions: recipe -> loss -> gradient engine -> optimizer.

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
from ..optim.optimizer_update import Update
from ..optim.optimizers import mean_gradient_norm

Step = Callable[..., tuple[TrainState, dict[str, jax.Array]]]  # (state, batch), and the number of its first row
ApplyUpdate = Callable[[Sums, TrainState], tuple[TrainState, dict[str, jax.Array]]]


def no_extra_inputs(state: TrainState) -> dict[str, Any]:
    """What an engine is told of the state besides: no more than a batch."""
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
    """A pure step: the sums of a batch, and what `applied` makes of them.

    `told(state)` is what else the engine takes, by name. `numbers()` are those of a batch's rows, None: as they stand.
    """

    def step(state: TrainState, batch: Batch, first_row: Any = 0) -> tuple[TrainState, dict[str, jax.Array]]:
        rows = jnp.arange(batch["tokens"].shape[0]) if row_ids is None else row_ids()
        keys = row_keys(state, rows=first_row + rows) if dropout else None
        return apply_update(engine(state.params, state.frozen, batch, keys, **extra_inputs(state)), state)

    return step


def make_update(update: Update, *, schedule: optax.Schedule, spike: float | None) -> ApplyUpdate:
    """The update by what a batch added up to.

    None is healthy that is not finite, or whose norm exceeds `spike` times the mean so far.
    """

    def applied(sums: Sums, state: TrainState) -> tuple[TrainState, dict[str, jax.Array]]:
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
        # An update that is not applied still counts as a step, so that the data goes on.
        return dataclasses.replace(state, step=state.step + 1, params=new.params, opt_state=new.opt_state), metrics

    return applied


def row_keys(state: TrainState, *, rows: jax.Array) -> jax.Array:
    """One key for each of `rows` of the global batch: no mesh, microbatch or process count changes what a row draws."""
    key = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
    return jax.vmap(jax.random.fold_in, (None, 0))(key, rows)
