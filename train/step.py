"""One optimizer step, as a composition of functions: recipe -> loss -> gradient engine -> optimizer.

step(state, batch) -> (state, metrics)
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from ..configs.model import ModelConfig
from ..configs.parallel import MemoryConfig
from ..models.context import Context
from ..parallel.state import TrainState, combine
from ..parallel.vocabulary import token_logprobs
from .gradients import Batch, Engine, Loss, Sums
from .optimizers import mean_norm
from .recipes import interface as recipes
from .update import Update

Step = Callable[..., tuple[TrainState, dict[str, jax.Array]]]  # (state, batch), and the number of its first row
Applied = Callable[[Sums, TrainState], tuple[TrainState, dict[str, jax.Array]]]


def make_logprobs(
    graph: Any, *, model: ModelConfig, memory: MemoryConfig, context: Callable[..., Context]
) -> Callable[..., jax.Array]:
    """(params, frozen, batch, keys) -> log p of each target. `context(batch, keys)` is what blocks are told."""

    def logprobs(params: Any, frozen: Any, batch: Batch, keys: jax.Array | None) -> jax.Array:
        ctx = context(batch, keys)
        decoder = nnx.merge(graph, combine(params, frozen))
        hidden, _ = decoder.hidden(batch["tokens"], ctx)
        return token_logprobs(
            hidden,
            decoder.head_kernel(ctx.compute),
            batch["targets"],
            vocab=model.vocab,
            softcap=model.logit_softcap,
            chunks=memory.loss_chunks,
            constrain=ctx.constrain,
        )

    return logprobs


def make_scores(graph: Any, *, context: Callable[..., Context]) -> Callable[..., jax.Array]:
    """(params, frozen, batch, keys) -> the score of each token, of a model that has one in the head's place."""

    def scores(params: Any, frozen: Any, batch: Batch, keys: jax.Array | None) -> jax.Array:
        ctx = context(batch, keys)
        decoder = nnx.merge(graph, combine(params, frozen))
        hidden, _ = decoder.hidden(batch["tokens"], ctx)
        return ctx.constrain(decoder.score(hidden), ("batch", "sequence"))

    return scores


def make_loss(
    values: Callable[..., jax.Array], recipe: recipes.Loss, measures: Mapping[str, recipes.Loss] | None = None
) -> Loss:
    """The recipe's numerator and weight of a batch, by parameters; `values` as `make_logprobs` gives them."""

    def loss(
        params: Any, frozen: Any, batch: Batch, keys: jax.Array | None
    ) -> tuple[jax.Array, tuple[jax.Array, dict]]:
        found = values(params, frozen, batch, keys)
        numerator, weight = recipe(found, batch)
        return numerator, (weight, {name: measure(found, batch)[0] for name, measure in (measures or {}).items()})

    return loss


def nothing(state: TrainState) -> dict[str, Any]:
    """What an engine is told of the state besides: no more than a batch."""
    del state
    return {}


def make_step(
    engine: Engine,
    applied: Applied,
    *,
    dropout: bool,
    told: Callable[[TrainState], dict[str, Any]] = nothing,
    numbers: Callable[[], jax.Array] | None = None,
) -> Step:
    """A pure step: the sums of a batch, and what `applied` makes of them.

    `told(state)` is what else the engine takes, by name. `numbers()` are those of a batch's rows, None: as they stand.
    """

    def step(state: TrainState, batch: Batch, first_row: Any = 0) -> tuple[TrainState, dict[str, jax.Array]]:
        rows = jnp.arange(batch["tokens"].shape[0]) if numbers is None else numbers()
        keys = row_keys(state, rows=first_row + rows) if dropout else None
        return applied(engine(state.params, state.frozen, batch, keys, **told(state)), state)

    return step


def make_applied(update: Update, *, schedule: optax.Schedule, spike: float | None) -> Applied:
    """The update by what a batch added up to.

    None is healthy that is not finite, or whose norm exceeds `spike` times the mean so far.
    """

    def applied(sums: Sums, state: TrainState) -> tuple[TrainState, dict[str, jax.Array]]:
        weight = jnp.maximum(sums.weight, 1e-9)
        gradient = jax.tree.map(lambda leaf: leaf.astype(jnp.float32) / weight, sums.gradient)
        norm = optax.global_norm(gradient)
        healthy = jnp.isfinite(norm) & jnp.isfinite(sums.loss)
        if spike is not None:
            healthy &= norm < spike * mean_norm(state.opt_state)
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
