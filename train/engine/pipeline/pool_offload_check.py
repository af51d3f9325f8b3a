"""The check of `memory/offload_check.py` for a pipeline, whose offloaded values wait in pools in host memory.

check_offload(model, chosen, platform="gpu", gradient=partial(pooled_gradient, compute="bfloat16"))
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ....configs.names import MESH_AXES
from ....configs.sections.base import Decision
from ....configs.sections.model import ModelConfig
from ....configs.sections.parallel import MemoryConfig
from ....memory.offload_check import BATCH, REPEATS, Remat, tokens_and_params
from ....memory.policy import make_remat
from ....models.context import Context, unconstrained
from ....models.decoder import decoder_graphdef
from ....parallel.gradients import Batch
from ....parallel.pipeline.tables.lowering import lower_table
from ....parallel.pipeline.tables.schedules.registry import make_table
from ...objectives.loss_heads import make_loss_head, target_logprobs
from .stages import make_engine, make_stage_functions


def pooled_gradient(
    model: ModelConfig, chosen: Mapping[str, Decision] | None, *, compute: Any, remat: Remat = make_remat
) -> Any:
    """By all parameters, out of a pipeline of one device and as many microbatches as there are rows, all in flight."""
    tokens, params = tokens_and_params(model)
    structure, shapes = decoder_graphdef(model), jax.eval_shape(lambda: params)
    axes = (jax.sharding.AxisType.Auto,) * len(MESH_AXES)
    mesh = Mesh(np.array(jax.local_devices()[:1]).reshape([1] * len(MESH_AXES)), MESH_AXES, axis_types=axes)
    cut = make_stage_functions(
        structure,
        shapes,
        model=model,
        ending=make_loss_head(target_logprobs(model, MemoryConfig()), negative_sum),
        context=lambda fields, keys: Context(
            positions=fields["positions"], remat=remat(chosen, scanned=True), compute_dtype=compute
        ),
        constrain=unconstrained,
        compute=jnp.dtype(compute),
    )
    engine = make_engine(
        cut,
        lower_table(make_table("gpipe", devices=1, microbatches=BATCH), repeats=(REPEATS,)),
        repeats=REPEATS,
        mesh=mesh,
        zero=1,
        compute=jnp.dtype(compute),
        dtype=jnp.float32,
    )
    places = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    batch = {"tokens": tokens, "targets": np.roll(tokens, -1, axis=1), "positions": places}
    with jax.set_mesh(mesh):
        return jax.jit(lambda params: engine(params, {}, batch, None).gradient)(params)


def negative_sum(logprobs: jax.Array, fields: Batch) -> tuple[jax.Array, jax.Array]:
    """Every token counts the same."""
    return -logprobs.sum(), jnp.float32(fields["targets"].size)
