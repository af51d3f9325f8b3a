"""LREC, low-rank error correction: an adapter learns to make a quantized model say what the whole one says.

    loss = KL(whole || quantized + adapter), a mean over the tokens that count

The whole model's weights are in `frozen["teacher"]`, sharded like any; it has no gradient. Held-out numbers of such a
run are those of the next token, so that they tell how much of the loss is recovered. Source: INT2.1, arXiv:2306.08162.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from ..configs.model import ModelConfig
from ..configs.parallel import MemoryConfig
from ..models.context import Context
from ..models.decoder import graph as plain_graph
from ..parallel.divergence import divergence
from ..parallel.state import combine
from .gradients import Batch, Loss


def without_teacher(frozen: Any) -> Any:
    """What the quantized model reads."""
    return {name: part for name, part in frozen.items() if name != "teacher"} if isinstance(frozen, dict) else frozen


def repair_loss(graph: Any, *, model: ModelConfig, memory: MemoryConfig, context: Callable[..., Context]) -> Loss:
    """Numerator and weight of a batch. `graph` is the structure of the quantized model and its adapter."""
    whole = plain_graph(model)

    def loss(
        params: Any, frozen: Any, batch: Batch, keys: jax.Array | None
    ) -> tuple[jax.Array, tuple[jax.Array, dict]]:
        ctx = context(batch, keys)
        student = nnx.merge(graph, combine(params, without_teacher(frozen)))
        teacher = nnx.merge(whole, jax.lax.stop_gradient(frozen["teacher"]))
        said, _ = student.hidden(batch["tokens"], ctx)
        wanted, _ = teacher.hidden(batch["tokens"], dataclasses.replace(ctx, dropout_keys=None))
        apart = divergence(
            (wanted, teacher.head_kernel(ctx.compute)),
            (said, student.head_kernel(ctx.compute)),
            vocab=model.vocab,
            softcap=model.logit_softcap,
            chunks=memory.loss_chunks,
            constrain=ctx.constrain,
        )
        weights = batch["loss_weights"]
        return (weights * apart).sum(), (weights.sum(), {})

    return loss
