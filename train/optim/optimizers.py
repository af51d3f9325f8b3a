"""Optimizers by the name in `optimizer.name`, composed from optax: clip -> rule -> decay -> learning rate -> average.

Each part has a name, so that the state of `adamw` is called `opt_state/adamw/...` whatever stands before it. An entry
of `RULES` maps the section to the direction of the update, before decay and learning rate. Rules that look at a whole
matrix or layer (muon, adafactor's clip) see each layer of a stack by itself. All arithmetic and state is float32,
whatever the parameters are: in bfloat16 a second moment with b2 above 0.99 never moves.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ...configs.errors import UserError
from ...configs.sections.training import OptimizerConfig
from ...models.logical_axes import axis_names, is_stacked
from ...parallel.sharding import path_name

RULES: dict[str, Callable[[OptimizerConfig], optax.GradientTransformation]] = {
    "adamw": lambda o: optax.scale_by_adam(b1=o.b1, b2=o.b2, eps=o.epsilon),
    "adam": lambda o: optax.scale_by_adam(b1=o.b1, b2=o.b2, eps=o.epsilon),
    "sgd": lambda o: optax.trace(decay=o.b1) if o.b1 else optax.identity(),
    "lion": lambda o: optax.scale_by_lion(b1=o.b1, b2=o.b2),
    "adafactor": lambda o: optax.chain(optax.scale_by_factored_rms(), clip_by_layer_rms(1.0)),
    "muon": lambda o: muon(o),
}


def build(
    optimizer: OptimizerConfig,
    *,
    steps: int,
    spike: float | None = None,
    clip: Callable[[float], optax.GradientTransformation] = optax.clip_by_global_norm,
    scale: Callable[[str, jax.Array], jax.Array] | None = None,
) -> optax.GradientTransformation:
    """The whole update for a run of `steps`: negative directions scaled by the learning rate, ready to be added.

    With `spike` the state also follows the mean gradient norm, which `mean_norm` reads. `clip(limit)` keeps the norm
    below `optimizer.clip`. `multiplied(path, update)` has
    the last word on the update of each weight (an adapter's).
    """
    parts = [
        ("norms", track_gradient_norm() if spike else None),
        ("clip", clip(optimizer.clip) if optimizer.clip else None),
        (optimizer.name, RULES[optimizer.name](optimizer)),
        ("decay", optax.add_decayed_weights(optimizer.weight_decay, mask=decay_mask(optimizer))),
        ("learning_rate", optax.scale_by_learning_rate(schedule(optimizer, steps=steps))),
        ("multiplied", by_path(scale) if scale else None),
        ("average", track_parameter_average(optimizer.ema) if optimizer.ema else None),
    ]
    return in_float32(optax.named_chain(*((name, part) for name, part in parts if part is not None)))


def unclipped(limit: float) -> optax.GradientTransformation:
    """In the place of clipping, with the same state: as if no norm ever came to `limit`."""
    del limit
    return optax.identity()


def by_path(change: Callable[[str, jax.Array], jax.Array]) -> optax.GradientTransformation:
    """Each update as `change(path of the weight, update)` makes it."""
    return optax.stateless(
        lambda updates, _: jax.tree_util.tree_map_with_path(lambda path, leaf: change(path_name(path), leaf), updates)
    )


def in_float32(rule: optax.GradientTransformation) -> optax.GradientTransformation:
    """`rule` on float32 copies of gradients and parameters; its state has the names and shapes it has without."""

    def wide(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree)

    def init(params: Any) -> Any:
        return rule.init(wide(params))

    def update(updates: Any, state: Any, params: Any) -> tuple[Any, Any]:
        return rule.update(wide(updates), state, wide(params))

    return optax.GradientTransformation(init, update)


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


def decay_mask(optimizer: OptimizerConfig) -> Callable[[Any], Any]:
    """Mask of the weights that decay: those with two named dimensions or more; embeddings only if asked."""

    def decayed(path: tuple[Any, ...], leaf: Any) -> bool:
        del leaf
        name = path_name(path)
        matrix = sum(axis is not None for axis in axis_names(name)) >= 2 and name.endswith("/kernel")
        matrix = matrix or name.endswith(("/adapter/a", "/adapter/b", "/adapter/down", "/adapter/up"))
        return matrix or (optimizer.decay_embeddings and name.startswith("embed/"))

    return lambda params: jax.tree_util.tree_map_with_path(decayed, params)


def clip_by_layer_rms(threshold: float) -> optax.GradientTransformation:
    """Scale down a layer's update whose root mean square is above `threshold`. Source: Adafactor, arXiv:1804.04235."""

    def clipped(path: tuple[Any, ...], update: jax.Array) -> jax.Array:
        own = tuple(range(layer_dimensions(path_name(path), update), update.ndim))
        rms = jnp.sqrt(jnp.mean(jnp.square(update), axis=own, keepdims=True))
        return update / jnp.maximum(1.0, rms / threshold)

    return optax.stateless(lambda updates, _: jax.tree_util.tree_map_with_path(clipped, updates))


def layer_dimensions(name: str, leaf: Any) -> int:
    """Dimensions of the weight called `name` that number layers."""
    return leaf.ndim - len(axis_names(name)) if is_stacked(name) else 0


def muon(optimizer: OptimizerConfig) -> optax.GradientTransformation:
    """Muon on the kernels of the blocks, each layer its own matrix [in, out]; adam on everything else.

    A stacked kernel [repeats, embed, heads, head_dim] is `repeats` matrices, its input and output dimensions flattened.
    RMS of the update is matched to adam's (arXiv:2502.16982), so that both take one learning rate. Raises UserError
    where no parameter is such a matrix.
    """

    def dimensions(path: tuple[Any, ...], leaf: Any) -> optax.contrib.MuonDimensionNumbers | None:
        name = path_name(path)
        if not (is_stacked(name) and name.endswith("/kernel")):
            return None
        first = layer_dimensions(name, leaf)
        middle = first + (2 if name.endswith("attn/o/kernel") else 1)
        return optax.contrib.MuonDimensionNumbers(tuple(range(first, middle)), tuple(range(middle, leaf.ndim)))

    def all_dimensions(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(dimensions, params)

    rule = optax.contrib.muon(
        learning_rate=1.0,
        beta=optimizer.b1,
        eps=optimizer.epsilon,
        adam_b1=optimizer.b1,
        adam_b2=optimizer.b2,
        consistent_rms=0.2,
        muon_weight_dimension_numbers=all_dimensions,
    )

    def init(params: Any) -> Any:
        if not jax.tree.leaves(all_dimensions(params)):
            names = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
            raise UserError(
                f"optimizer.name: muon found no block's kernel among {len(names)} parameters ({', '.join(names[:3])}, "
                "...); use adamw"
            )
        return rule.init(params)

    # optax's alias ends with the sign that `build` puts on.
    return optax.chain(optax.GradientTransformation(init, rule.update), optax.scale(-1.0))


class NormsState(NamedTuple):
    """Running mean of the gradient norm."""

    mean: jax.Array  # float32; 0 before the first update


def track_gradient_norm() -> optax.GradientTransformation:
    """Leave updates alone and follow the mean of their global norm over about the last hundred steps."""

    def init(params: Any) -> NormsState:
        del params
        return NormsState(jnp.zeros(()))

    def update(updates: Any, state: NormsState, params: Any = None) -> tuple[Any, NormsState]:
        del params
        norm = optax.global_norm(updates)
        return updates, NormsState(jnp.where(state.mean == 0, norm, 0.99 * state.mean + 0.01 * norm))

    return optax.GradientTransformation(init, update)


def mean_gradient_norm(opt_state: Any) -> jax.Array:
    """The mean gradient norm so far; infinite before the first update, so that nothing counts as a spike."""
    mean = opt_state["norms"].mean
    return jnp.where(mean == 0, jnp.inf, mean)


class AverageState(NamedTuple):
    """Exponential moving average of the parameters."""

    params: Any  # like the parameters, float32


def track_parameter_average(decay: float) -> optax.GradientTransformation:
    """Leave updates alone and follow the parameters they lead to: average = decay * average + (1 - decay) * params."""

    def init(params: Any) -> AverageState:
        return AverageState(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params))

    def update(updates: Any, state: AverageState, params: Any = None) -> tuple[Any, AverageState]:
        new = optax.apply_updates(params, updates)
        return updates, AverageState(optax.incremental_update(new, state.params, 1 - decay))

    return optax.GradientTransformation(init, update)
