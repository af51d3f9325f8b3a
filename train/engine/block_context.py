"""The `Context` that every block gets for a batch: attention, products, sharding, dropout and what to recompute.

    values = loss_heads.values_fn(token_values, graph, context=partial(make_context, config, mesh))

Models never see a mesh: they call what is in their context.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ...configs.names import ADAPTER_IDS_FIELD
from ...configs.run import RunConfig
from ...memory import policy
from ...models.context import Context, flat_linear, linear, no_constraint
from ...parallel.attention import sharded_attention, token_order
from ...parallel.gradients import Batch
from ...parallel.sharding import constrainer
from ...parallel.vocabulary import embedding_lookup
from .multi_adapter import sharded_product


def local_context(config: RunConfig, mesh: Mesh, batch: Batch, keys: jax.Array | None) -> Context:
    """The context of blocks whose rows are computed whole by one device of `mesh`."""
    local_mesh = Mesh(mesh.devices.reshape(-1)[:1].reshape([1] * mesh.devices.ndim), mesh.axis_names)
    lookup = partial(embedding_lookup, constrain=no_constraint)
    return dataclasses.replace(make_context(config, local_mesh, batch, keys), constrain=no_constraint, lookup=lookup)


def make_context(config: RunConfig, mesh: Mesh, batch: Batch, keys: jax.Array | None) -> Context:
    """The context that every block gets for one batch on `mesh`. `keys` [rows] are for dropout; None: no dropout."""
    decisions = policy.tensor_decisions(config.memory, tensors=policy.emitted_tensors(config.model))
    constrain = constrainer(mesh)
    order = token_order(batch["tokens"].shape[1], mesh=mesh, strategy=config.sequence.parallel)
    return Context(
        positions=batch["positions"],
        segment_ids=batch["segment_ids"],
        index=None if order is None else jnp.asarray(order),
        dropout_keys=keys,
        adapter_ids=batch[ADAPTER_IDS_FIELD][:, 0] if config.adapters else None,
        adapter_product=sharded_product(config.adapter.product, mesh) if config.adapters else None,
        attend=sharded_attention(config.model.attention, mesh=mesh, strategy=config.sequence.parallel),
        linear=flat_linear if mesh.shape["seq"] == 1 else linear,
        lookup=partial(embedding_lookup, constrain=constrain),
        constrain=constrain,
        remat=policy.make_remat(decisions, scanned=config.model.scan),
        compute_dtype=jnp.dtype(config.precision.compute),
    )
