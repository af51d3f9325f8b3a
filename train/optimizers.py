"""Optimizers by the name used in `optimizer.name`, composed from optax: clip -> rule -> decay -> learning rate -> average.

Each part has a name, so that the state of `adamw` is called `opt_state/adamw/...` whatever stands before it. An entry
of `RULES` maps the section to the direction of the update, before decay and learning rate.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ..configs.training import OptimizerConfig
from ..models.axes import axis_names, stacked
from ..parallel.rules import path_name

RULES: dict[str, Callable[[OptimizerConfig], optax.GradientTransformation]] = {
    "adamw": lambda o: optax.scale_by_adam(b1=o.b1, b2=o.b2, eps=o.epsilon),
    "adam": lambda o: optax.scale_by_adam(b1=o.b1, b2=o.b2, eps=o.epsilon),
    "sgd": lambda o: optax.trace(decay=o.b1) if o.b1 else optax.identity(),
    "lion": lambda o: optax.scale_by_lion(b1=o.b1, b2=o.b2),
    "adafactor": lambda o: optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0)),
    "muon": lambda o: muon(o),
}


def build(optimizer: OptimizerConfig, *, steps: int, spike: float | None = None) -> optax.GradientTransformation:
    """The whole update for a run of `steps`: negative directions scaled by the learning rate, ready to be added.

    With `spike` the state also follows the mean gradient norm, which `mean_norm` reads.
    """
    parts = [
        ("norms", norms() if spike else None),
        ("clip", optax.clip_by_global_norm(optimizer.clip) if optimizer.clip else None),
        (optimizer.name, RULES[optimizer.name](optimizer)),
        ("decay", optax.add_decayed_weights(optimizer.weight_decay, mask=decays(optimizer))),
        ("learning_rate", optax.scale_by_learning_rate(schedule(optimizer, steps=steps))),
        ("average", average(optimizer.ema) if optimizer.ema else None),
    ]
    return optax.named_chain(*((name, part) for name, part in parts if part is not None))


def schedule(optimizer: OptimizerConfig, *, steps: int) -> optax.Schedule:
    """Learning rate of update number `count`, counted from 0; the last update has `final_fraction` of the peak."""
    peak, warmup = optimizer.learning_rate, optimizer.warmup_steps
    final, rest = peak * optimizer.final_fraction, max(steps - warmup - 1, 1)
    if optimizer.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, rest, alpha=optimizer.final_fraction)
    elif optimizer.schedule == "linear":
        after = optax.linear_schedule(peak, final, rest)
    elif optimizer.schedule == "wsd":
        drop = min(optimizer.decay_steps or max(steps // 10, 1), rest)
        after = optax.linear_schedule(peak, final, drop, transition_begin=rest - drop)
    else:
        after = optax.constant_schedule(peak)
    if not warmup:
        return after
    return optax.join_schedules([optax.linear_schedule(peak / warmup, peak, max(warmup - 1, 1)), after], [warmup])


def decays(optimizer: OptimizerConfig) -> Callable[[Any], Any]:
    """Mask of the weights that decay: those with two named dimensions or more; embeddings only if asked."""

    def decayed(path: tuple[Any, ...], leaf: Any) -> bool:
        del leaf
        name = path_name(path)
        matrix = sum(axis is not None for axis in axis_names(name)) >= 2 and name.endswith("/kernel")
        return matrix or (optimizer.decay_embeddings and name.startswith("embed/"))

    return lambda params: jax.tree_util.tree_map_with_path(decayed, params)


def muon(optimizer: OptimizerConfig) -> optax.GradientTransformation:
    """Muon on the kernels of the blocks, each layer its own matrix [in, out]; adam on everything else.

    A stacked kernel [repeats, embed, heads, head_dim] is `repeats` matrices, its input and output dimensions flattened.
    RMS of the update is matched to adam's (arXiv:2502.16982), so that both take one learning rate.
    """

    def dimensions(path: tuple[Any, ...], leaf: Any) -> optax.contrib.MuonDimensionNumbers | None:
        name = path_name(path)
        if leaf is None or not (stacked(name) and name.endswith("/kernel")):
            return None
        inputs = 2 if name.endswith("attn/o/kernel") else 1
        return optax.contrib.MuonDimensionNumbers(tuple(range(1, 1 + inputs)), tuple(range(1 + inputs, leaf.ndim)))

    rule = optax.contrib.muon(
        learning_rate=1.0,
        beta=optimizer.b1,
        adam_b1=optimizer.b1,
        adam_b2=optimizer.b2,
        consistent_rms=0.2,
        muon_weight_dimension_numbers=lambda params: jax.tree_util.tree_map_with_path(dimensions, params),
    )
    return optax.chain(rule, optax.scale(-1.0))  # optax's alias ends with the sign that `build` puts on


class NormsState(NamedTuple):
    """Running mean of the gradient norm."""

    mean: jax.Array  # float32; 0 before the first update


def norms() -> optax.GradientTransformation:
    """Leave updates alone and follow the mean of their global norm over about the last hundred steps."""

    def init(params: Any) -> NormsState:
        del params
        return NormsState(jnp.zeros(()))

    def update(updates: Any, state: NormsState, params: Any = None) -> tuple[Any, NormsState]:
        del params
        norm = optax.global_norm(updates)
        return updates, NormsState(jnp.where(state.mean == 0, norm, 0.99 * state.mean + 0.01 * norm))

    return optax.GradientTransformation(init, update)


def mean_norm(opt_state: Any) -> jax.Array:
    """The mean gradient norm so far; infinite before the first update, so that nothing counts as a spike."""
    mean = opt_state["norms"].mean
    return jnp.where(mean == 0, jnp.inf, mean)


class AverageState(NamedTuple):
    """Exponential moving average of the parameters."""

    params: Any  # like the parameters, float32


def average(decay: float) -> optax.GradientTransformation:
    """Leave updates alone and follow the parameters they lead to: average = decay * average + (1 - decay) * params."""

    def init(params: Any) -> AverageState:
        return AverageState(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params))

    def update(updates: Any, state: AverageState, params: Any = None) -> tuple[Any, AverageState]:
        new = optax.apply_updates(params, updates)
        return updates, AverageState(optax.incremental_update(new, state.params, 1 - decay))

    return optax.GradientTransformation(init, update)
