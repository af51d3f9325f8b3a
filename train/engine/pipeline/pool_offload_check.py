"""The gradient that `memory/offload_check.py` checks for a pipeline, whose offloaded values wait in host memory pools.

check_offload(model, decisions, platform="gpu", gradient=partial(pooled_gradient, compute="bfloat16"))
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ....configs.names import MESH_AXES
from ....configs.sections.base import MemoryDecision
from ....configs.sections.model import ModelConfig
from ....configs.sections.parallel import MemoryConfig
from ....memory.offload_check import BATCH, REPEATS, Remat, tokens_and_params
from ....memory.policy import make_remat
from ....models.context import Context, no_constraint
from ....models.decoder import decoder_graphdef
from ....parallel.gradients import Batch
from ....parallel.pipeline.tables.lowering import lower_table
from ....parallel.pipeline.tables.schedules.registry import make_table
from ...objectives.loss_heads import make_loss_head, target_logprobs
from .stages import make_engine, make_stage_functions


def pooled_gradient(
    model: ModelConfig, decisions: Mapping[str, MemoryDecision] | None, *, compute: Any, remat: Remat = make_remat
) -> Any:
    """The gradient of all parameters from a pipeline on one device: one row a microbatch, all of them in flight."""
    tokens, params = tokens_and_params(model)
    axis_types = (jax.sharding.AxisType.Auto,) * len(MESH_AXES)
    mesh = Mesh(np.array(jax.local_devices()[:1]).reshape([1] * len(MESH_AXES)), MESH_AXES, axis_types=axis_types)
    functions = make_stage_functions(
        decoder_graphdef(model),
        jax.eval_shape(lambda: params),
        model=model,
        loss_head=make_loss_head(target_logprobs(model, MemoryConfig()), negative_sum),
        context=lambda fields, keys: Context(
            positions=fields["positions"], remat=remat(decisions, scanned=True), compute_dtype=compute
        ),
        constrain=no_constraint,
        compute=jnp.dtype(compute),
    )
    engine = make_engine(
        functions,
        lower_table(make_table("gpipe", devices=1, microbatches=BATCH), repeats=(REPEATS,)),
        repeats=REPEATS,
        mesh=mesh,
        zero=1,
        compute=jnp.dtype(compute),
        dtype=jnp.float32,
    )
    positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    batch = {"tokens": tokens, "targets": np.roll(tokens, -1, axis=1), "positions": positions}
    with jax.set_mesh(mesh):
        return jax.jit(lambda params: engine(params, {}, batch, None).gradient)(params)


def negative_sum(logprobs: jax.Array, fields: Batch) -> tuple[jax.Array, jax.Array]:
    """A recipe in which every token has weight 1."""
    return -logprobs.sum(), jnp.float32(fields["targets"].size)
