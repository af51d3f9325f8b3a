"""DP-SGD: the gradient of each row is clipped, and noise is added to their sum. Source: arXiv:1607.00133.

    gradient = (sum over rows of g_i min(1, clip / |g_i|) + noise clip normal) / rows

g_i is the gradient of the mean loss of row i. A first pass computes its norm without that gradient (`ghost_norms.py`).
The second pass is the usual one, over losses that are scaled down where the norm exceeds `clip`. The divisor is the
number of rows of a batch, whatever is in them. A row whose norm is not finite counts as an empty one, so that it does
not spoil the step of the others. The noise is drawn from the run's key and the step, so that a resumed run draws the
same noise, and the privacy spent follows from the step (`accounting.py`).
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from ....configs.errors import UserError
from ....configs.sections.adapter import AdapterConfig
from ....configs.sections.model import ModelConfig
from ....configs.sections.privacy import PrivacyConfig
from ....parallel.gradients import Batch, Engine, Sums
from ....parallel.sharding import map_with_path
from ....parallel.state import TrainState, combine
from ....parallel.vocabulary import cap_and_mask, target_logprobs
from ...objectives.interface import RecipeLoss
from ...objectives.loss_heads import MakeContext
from ...optim.optimizer_update import Update, UpdateResult
from . import ghost_norms

RowValues = Callable[[Any, Any, Batch, jax.Array | None], jax.Array]  # (params, frozen, batch, keys) -> [rows, ...]
NOISE_KEY_ID = 2**32 - 1  # used in place of a row id; no row has it, so no row has the key of the noise


def clipped_engine(
    values: RowValues, recipe: RecipeLoss, *, squared_norms: RowValues, clip: float, dtype: Any
) -> Engine:
    """An engine that sums up row gradients of norm at most `clip`; the weight is the number of rows.

    `values` are log p of the targets, `squared_norms` [rows] those of the row gradients.
    """

    def engine(params: Any, frozen: Any, batch: Batch, keys: jax.Array | None) -> Sums:
        norms = jnp.sqrt(squared_norms(params, frozen, batch, keys))  # [rows]
        finite = jnp.isfinite(norms)
        scale = jnp.where(finite, jnp.minimum(1, clip / jnp.maximum(norms, 1e-30)), 0)
        finite_rows = blank_rows(batch, ~finite)

        def scaled_loss(params: Any) -> tuple[jax.Array, jax.Array]:
            losses = row_losses(recipe, values(params, frozen, finite_rows, keys), finite_rows)
            return (scale * losses).sum(), losses

        gradient, losses = jax.grad(scaled_loss, has_aux=True)(params)
        clipped = ~finite | (norms > clip)
        metrics = {"clipped": clipped.sum().astype(jnp.float32), "row_norm": jnp.where(finite, norms, 0).sum()}
        weight = jnp.asarray(losses.shape[0], jnp.float32)
        return Sums(losses.sum(), weight, optax.tree.cast(gradient, dtype), metrics)

    return engine


def blank_rows(batch: Batch, blank: jax.Array) -> Batch:
    """Turn the rows of `batch` where `blank` [rows] is true into padding.

    It would not do to multiply their gradients by 0, because 0 times infinity is not 0.
    """
    return jax.tree.map(lambda field: jnp.where(blank.reshape(-1, *[1] * (field.ndim - 1)), 0, field), batch)


def row_losses(recipe: RecipeLoss, values: jax.Array, batch: Batch) -> jax.Array:
    """The mean loss of each row [rows]; 0 for a row without weight."""

    def row_loss(values: jax.Array, row: Batch) -> jax.Array:
        numerator, weight = recipe(values[None], jax.tree.map(lambda x: x[None], row))
        return numerator / jnp.maximum(weight, 1e-9)

    return jax.vmap(row_loss)(values, batch)


def make_squared_norms(
    graph: Any, recipe: RecipeLoss, *, model: ModelConfig, adapter: AdapterConfig | None, context: MakeContext
) -> RowValues:
    """(params, frozen, batch, keys) -> [rows] squared norms of the gradients of `row_losses`.

    `context(batch, keys)` is the context of blocks that one device computes whole.
    """

    def row_norm(params: Any, frozen: Any, row: Batch, key: jax.Array | None) -> jax.Array:
        batch = {name: field[None] for name, field in row.items()}
        ctx = context(batch, None if key is None else key[None])

        def loss(probe: jax.Array, params: Any) -> jax.Array:
            probed = dataclasses.replace(
                ctx,
                linear=ghost_norms.probed_linear(ctx.linear, probe),
                lookup=ghost_norms.probed_lookup(ctx.lookup, probe),
            )
            decoder = nnx.merge(graph, combine(probe_other_leaves(params, probe, adapter=adapter), frozen))
            hidden, _ = decoder.hidden(batch["tokens"], probed)
            scores = probed.linear(hidden, decoder.head_kernel(ctx.compute_dtype)).astype(jnp.float32)
            scores = cap_and_mask(scores, vocab=model.vocab, softcap=model.logit_softcap)
            return row_losses(recipe, target_logprobs(scores, batch["targets"]), batch)[0]

        # Differentiate by the parameters too, so that the rules see which weights are trained; drop those gradients.
        return jax.grad(loss, argnums=(0, 1))(jnp.zeros(()), params)[0]

    return lambda params, frozen, batch, keys: jax.vmap(row_norm, (None, None, 0, None if keys is None else 0))(
        params, frozen, batch, keys
    )


def probe_other_leaves(params: Any, probe: jax.Array, *, adapter: AdapterConfig | None) -> Any:
    """`params` whose weights that have no rule of their own are probed."""

    return map_with_path(
        lambda path, leaf: leaf if has_norm_rule(path, adapter) else ghost_norms.attach_probe(leaf, probe), params
    )


def has_norm_rule(path: str, adapter: AdapterConfig | None) -> bool:
    """Whether the whole gradient of the weight at `path` comes through `Context.linear` or `Context.lookup`."""
    if path.endswith("/kernel") or path == "embed/embedding":
        return True
    return adapter is not None and adapter.method in ("lora", "dora") and path.endswith(("/adapter/a", "/adapter/b"))


def add_noise(update: Update, privacy: PrivacyConfig, *, rows: int) -> Update:
    """`update` of a noisy gradient, a mean over `rows`. Raises UserError if jax-privacy is not installed."""
    try:
        from jax_privacy.noise_addition import gaussian_privatizer
    except ImportError:
        raise UserError("privacy: draws its noise by jax-privacy; pip install 'meshwright[privacy]'") from None
    # A plan may not know the noise yet, which depends on the data. NaN plans as well, and nobody trains with it.
    deviation = (math.nan if privacy.noise is None else privacy.noise) * privacy.clip / rows

    def run(gradient: Any, state: TrainState, norm: jax.Array, healthy: jax.Array) -> UpdateResult:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
        privatizer = gaussian_privatizer(stddev=deviation, prng_key=jax.random.fold_in(key, NOISE_KEY_ID))
        noisy, _ = privatizer.update(gradient, privatizer.init(gradient))
        return update(noisy, state, norm, healthy)

    return run
