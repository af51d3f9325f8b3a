"""Optimizers by the name in `optimizer.name`, composed from optax: clip -> rule -> decay -> learning rate -> average.

Each part has a name, so that the state of `adamw` is `opt_state/adamw/...` whatever comes before it. An entry of
`RULES` maps the section to the direction of the update, before decay and learning rate. Rules that read a whole matrix
or layer (muon, adafactor's clip) see each layer of a stack by itself. All arithmetic and state is float32, whatever the
dtype of the parameters: in bfloat16 a second moment with b2 above 0.99 never changes.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ...configs.errors import UserError
from ...configs.sections.training import OptimizerConfig
from ...models.logical_axes import axis_names, is_stacked
from ...parallel.sharding import map_with_path, path_name
from .gradient_clipping import clip_gradients
from .learning_rate_schedule import learning_rate_schedule

RULES: dict[str, Callable[[OptimizerConfig], optax.GradientTransformation]] = {
    "adamw": lambda o: optax.scale_by_adam(b1=o.b1, b2=o.b2, eps=o.epsilon),
    "adam": lambda o: optax.scale_by_adam(b1=o.b1, b2=o.b2, eps=o.epsilon),
    "sgd": lambda o: optax.trace(decay=o.b1) if o.b1 else optax.identity(),
    "lion": lambda o: optax.scale_by_lion(b1=o.b1, b2=o.b2),
    "adafactor": lambda o: optax.chain(optax.scale_by_factored_rms(), clip_by_layer_rms(1.0)),
    "muon": lambda o: muon(o),
}


def build_optimizer(
    optimizer: OptimizerConfig,
    *,
    steps: int,
    spike: float | None = None,
    clip: Callable[[float], optax.GradientTransformation] | None = None,
    scale: Callable[[str, jax.Array], jax.Array] | None = None,
) -> optax.GradientTransformation:
    """Return the whole optimizer for a run of `steps`; its updates are to be added to the parameters.

    With `spike` the state also tracks the mean gradient norm, which `mean_gradient_norm` reads. `clip(limit)` replaces
    `clip_gradients`. `scale(path, update)` changes the final update of each weight (for an adapter).
    """
    parts = [
        ("norms", track_gradient_norm() if spike else None),
        ("clip", (clip or clip_gradients)(optimizer.clip) if optimizer.clip else None),
        (optimizer.name, RULES[optimizer.name](optimizer)),
        ("decay", optax.add_decayed_weights(optimizer.weight_decay, mask=decay_mask(optimizer))),
        ("learning_rate", optax.scale_by_learning_rate(learning_rate_schedule(optimizer, steps=steps))),
        ("multiplied", by_path(scale) if scale else None),
        ("average", track_parameter_average(optimizer.ema) if optimizer.ema else None),
    ]
    return in_float32(optax.named_chain(*((name, part) for name, part in parts if part is not None)))


def by_path(change: Callable[[str, jax.Array], jax.Array]) -> optax.GradientTransformation:
    """Replace each update by `change(path of the weight, update)`."""
    return optax.stateless(lambda updates, _: map_with_path(change, updates))


def in_float32(rule: optax.GradientTransformation) -> optax.GradientTransformation:
    """`rule` on float32 copies of gradients and parameters; names and shapes of its state do not change."""
    to_float32 = partial(optax.tree.cast, dtype=jnp.float32)

    def init(params: Any) -> Any:
        return rule.init(to_float32(params))

    def update(updates: Any, state: Any, params: Any) -> tuple[Any, Any]:
        return rule.update(to_float32(updates), state, to_float32(params))

    return optax.GradientTransformation(init, update)


def decay_mask(optimizer: OptimizerConfig) -> Callable[[Any], Any]:
    """Mask of the weights that decay: kernels with at least two named dimensions; embeddings only if asked for."""

    def decays(name: str, leaf: Any) -> bool:
        del leaf
        matrix = sum(axis is not None for axis in axis_names(name)) >= 2 and name.endswith("/kernel")
        matrix = matrix or name.endswith(("/adapter/a", "/adapter/b", "/adapter/down", "/adapter/up"))
        return matrix or (optimizer.decay_embeddings and name.startswith("embed/"))

    return lambda params: map_with_path(decays, params)


def clip_by_layer_rms(threshold: float) -> optax.GradientTransformation:
    """Scale down a layer's update whose root mean square is above `threshold`. Source: Adafactor, arXiv:1804.04235."""

    def clip(name: str, update: jax.Array) -> jax.Array:
        weight_dimensions = tuple(range(layer_dimensions(name, update), update.ndim))
        rms = jnp.sqrt(jnp.mean(jnp.square(update), axis=weight_dimensions, keepdims=True))
        return update / jnp.maximum(1.0, rms / threshold)

    return by_path(clip)


def layer_dimensions(name: str, leaf: Any) -> int:
    """How many leading dimensions of the weight `name` count layers."""
    return leaf.ndim - len(axis_names(name)) if is_stacked(name) else 0


def muon(optimizer: OptimizerConfig) -> optax.GradientTransformation:
    """Muon on the kernels of the blocks, one matrix [in, out] a layer; adam on everything else.

    A stacked kernel [repeats, embed, heads, head_dim] is `repeats` matrices; its input and output dimensions are
    flattened. The RMS of the update matches adam's (arXiv:2502.16982), so both use one learning rate. Its `init` raises
    UserError if no parameter is such a matrix.
    """

    def dimensions(name: str, leaf: Any) -> optax.contrib.MuonDimensionNumbers | None:
        if not (is_stacked(name) and name.endswith("/kernel")):
            return None
        first = layer_dimensions(name, leaf)
        middle = first + (2 if name.endswith("attn/o/kernel") else 1)
        return optax.contrib.MuonDimensionNumbers(tuple(range(first, middle)), tuple(range(middle, leaf.ndim)))

    all_dimensions = partial(map_with_path, dimensions)

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
                f"optimizer.name: muon finds no kernel of a block among {len(names)} trained parameters "
                f"({', '.join(names[:3])}, ...); use adamw"
            )
        return rule.init(params)

    # optax.contrib.muon returns a negative update, and `build_optimizer` changes the sign once more.
    return optax.chain(optax.GradientTransformation(init, rule.update), optax.scale(-1.0))


class NormsState(NamedTuple):
    """Running mean of the gradient norm."""

    mean: jax.Array  # float32; 0 before the first update


def track_gradient_norm() -> optax.GradientTransformation:
    """Track the mean global norm of the updates over about the last hundred steps; the updates do not change."""

    def init(params: Any) -> NormsState:
        del params
        return NormsState(jnp.zeros(()))

    def update(updates: Any, state: NormsState, params: Any = None) -> tuple[Any, NormsState]:
        del params
        norm = optax.global_norm(updates)
        return updates, NormsState(jnp.where(state.mean == 0, norm, 0.99 * state.mean + 0.01 * norm))

    return optax.GradientTransformation(init, update)


def mean_gradient_norm(opt_state: Any) -> jax.Array:
    """The tracked mean gradient norm; infinite before the first update, so that no norm counts as a spike."""
    mean = opt_state["norms"].mean
    return jnp.where(mean == 0, jnp.inf, mean)


class AverageState(NamedTuple):
    """Exponential moving average of the parameters."""

    params: Any  # like the parameters, float32


def track_parameter_average(decay: float) -> optax.GradientTransformation:
    """Track average = decay * average + (1 - decay) * new parameters; the updates do not change."""

    def init(params: Any) -> AverageState:
        return AverageState(optax.tree.cast(params, jnp.float32))

    def update(updates: Any, state: AverageState, params: Any = None) -> tuple[Any, AverageState]:
        new = optax.apply_updates(params, updates)
        return updates, AverageState(optax.incremental_update(new, state.params, 1 - decay))

    return optax.GradientTransformation(init, update)
