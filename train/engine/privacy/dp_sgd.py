"""DP-SGD: gradients of rows, none larger than the others may be, and noise over their sum. Source: arXiv:1607.00133.

    gradient = (sum over rows of g_i min(1, clip / |g_i|) + noise clip normal) / rows

g_i is the gradient of the mean loss of row i. Its norm comes from a first pass that makes no such gradient
(`ghost.py`); the second pass is the usual one, of losses scaled down where the norm asks for it. The divisor is the
number of rows of a batch, whatever is in them. A row without a finite norm counts as an empty one: it must not undo the
step of the others. Noise is drawn from the run's key and the step, so that a run that goes on draws what it would have
drawn, and what is spent follows from the step (`accounting.py`).
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ....configs.errors import UserError
from ....configs.sections.adapter import AdapterConfig
from ....configs.sections.model import ModelConfig
from ....configs.sections.privacy import PrivacyConfig
from ....models.context import Context
from ....parallel.gradients import Batch, Engine, Sums
from ....parallel.sharding import path_name
from ....parallel.state import TrainState, combine
from ....parallel.vocabulary import cap_and_mask, target_logprobs
from ...objectives import interface as recipes
from ...optim.optimizer_update import Update, UpdateResult
from . import ghost_norms

Values = Callable[[Any, Any, Batch, jax.Array | None], jax.Array]  # (params, frozen, batch, keys) -> log p of targets
Told = Callable[..., Context]  # (batch, keys) -> what the blocks are told
NOISE = 2**32 - 1  # in the place of a row's number: no row has it, so no row's key is that of the noise


def clipped_engine(values: Values, recipe: recipes.Loss, *, squared_norms: Values, clip: float, dtype: Any) -> Engine:
    """Sums over rows, of gradients of norm at most `clip`; the weight is the number of rows."""

    def engine(params: Any, frozen: Any, batch: Batch, keys: jax.Array | None) -> Sums:
        norms = jnp.sqrt(squared_norms(params, frozen, batch, keys))  # [rows]
        finite = jnp.isfinite(norms)
        scale = jnp.where(finite, jnp.minimum(1, clip / jnp.maximum(norms, 1e-30)), 0)
        kept = blank_rows(batch, keep=finite)

        def scaled(params: Any) -> tuple[jax.Array, jax.Array]:
            losses = row_losses(recipe, values(params, frozen, kept, keys), kept)
            return (scale * losses).sum(), losses

        gradient, losses = jax.grad(scaled, has_aux=True)(params)
        clipped = ~finite | (norms > clip)
        metrics = {"clipped": clipped.sum().astype(jnp.float32), "row_norm": jnp.where(finite, norms, 0).sum()}
        weight = jnp.asarray(losses.shape[0], jnp.float32)
        return Sums(losses.sum(), weight, jax.tree.map(lambda leaf: leaf.astype(dtype), gradient), metrics)

    return engine


def blank_rows(batch: Batch, *, keep: jax.Array) -> Batch:
    """`batch`, of its rows only those to `keep` [rows]; the others are padding.

    To multiply their gradients by 0 would not do: 0 times infinity is not 0.
    """

    def field(values: jax.Array) -> jax.Array:
        return jnp.where(keep.reshape(-1, *[1] * (values.ndim - 1)), values, 0)

    return jax.tree.map(field, batch)


def row_losses(recipe: recipes.Loss, values: jax.Array, batch: Batch) -> jax.Array:
    """The recipe's mean over each row [rows]; 0 of one without weight."""

    def one(values: jax.Array, row: Batch) -> jax.Array:
        numerator, weight = recipe(values[None], jax.tree.map(lambda x: x[None], row))
        return numerator / jnp.maximum(weight, 1e-9)

    return jax.vmap(one)(values, batch)


def make_norms(
    graph: Any, recipe: recipes.Loss, *, model: ModelConfig, adapter: AdapterConfig | None, context: Told
) -> Values:
    """(params, frozen, batch, keys) -> [rows] squared norms of the gradients of `row_losses`.

    `alone(batch, keys)` is what the blocks are told where nothing is cut.
    """

    def of_row(params: Any, frozen: Any, row: Batch, key: jax.Array | None) -> jax.Array:
        batch = {name: field[None] for name, field in row.items()}
        ctx = context(batch, None if key is None else key[None])

        def loss(probe: jax.Array, params: Any) -> jax.Array:
            rules = {
                "linear": ghost_norms.probed_linear(ctx.linear, probe),
                "lookup": ghost_norms.probed_lookup(ctx.lookup, probe),
            }
            told = dataclasses.replace(ctx, **rules)
            decoder = nnx.merge(graph, combine(probe_other_leaves(params, probe, adapter=adapter), frozen))
            hidden, _ = decoder.hidden(batch["tokens"], told)
            scores = told.linear(hidden, decoder.head_kernel(ctx.compute_dtype)).astype(jnp.float32)
            scores = cap_and_mask(scores, vocab=model.vocab, softcap=model.logit_softcap)
            return row_losses(recipe, target_logprobs(scores, batch["targets"]), batch)[0]

        # By the parameters too, so that the rules see which weights are trained; those gradients are thrown away.
        return jax.grad(loss, argnums=(0, 1))(jnp.zeros(()), params)[0]

    def squared(params: Any, frozen: Any, batch: Batch, keys: jax.Array | None) -> jax.Array:
        return jax.vmap(of_row, (None, None, 0, None if keys is None else 0))(params, frozen, batch, keys)

    return squared


def probe_other_leaves(params: Any, probe: jax.Array, *, adapter: AdapterConfig | None) -> Any:
    """`params`, of which those that no linear map and no lookup reads are watched."""

    def leaf(path: tuple[Any, ...], value: jax.Array) -> jax.Array:
        return value if has_norm_rule(path_name(path), adapter) else ghost_norms.probed(value, probe)

    return jax.tree_util.tree_map_with_path(leaf, params)


def has_norm_rule(path: str, adapter: AdapterConfig | None) -> bool:
    """Whether all of the gradient of the weight at `path` comes through `Context.linear` or `Context.lookup`."""
    if path.endswith("/kernel") or path == "embed/embedding":
        return True
    return adapter is not None and adapter.method in ("lora", "dora") and path.endswith(("/adapter/a", "/adapter/b"))


def add_noise(update: Update, privacy: PrivacyConfig, *, rows: int) -> Update:
    """`update` of a gradient with noise, which is a mean over `rows`. UserError where the library is not installed."""
    try:
        from jax_privacy.noise_addition import gaussian_privatizer
    except ImportError:
        raise UserError("privacy: draws its noise by jax-privacy; pip install 'meshwright[privacy]'") from None
    # To plan a run whose noise its data will tell, any number would do: with this one, nobody trains by mistake.
    deviation = (math.nan if privacy.noise is None else privacy.noise) * privacy.clip / rows

    def run(gradient: Any, state: TrainState, norm: jax.Array, healthy: jax.Array) -> UpdateResult:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
        drawn = gaussian_privatizer(stddev=deviation, prng_key=jax.random.fold_in(key, NOISE))
        return update(drawn.update(gradient, drawn.init(gradient))[0], state, norm, healthy)

    return run
