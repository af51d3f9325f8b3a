"""Outputs of a fixed model for every token that a run will read, computed once before its first step.

    data = with_reference_logprobs(program, data, samples=range(start, stop))

A recipe that compares with the initial model needs its log-probability of every token; one that learns from a teacher's
top-k tokens needs those. A fixed model's output at a token depends on the token's own document only, so one forward
pass over the data before training is enough: no second model is kept in memory, a pipeline needs no second pass, and
it makes no difference whether the model has an adapter or quantized weights.
"""

import dataclasses
import logging
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from ...configs.names import BATCH_FIELDS
from ...parallel.attention import token_order
from ...parallel.gradients import Batch
from ..data.assemble import Data
from ..data.batches import RowSource
from ..data.rows import Row
from ..data.token_annotations import Annotate, AnnotatedDataset, store_annotations, unannotated_batches
from ..engine.block_context import make_context
from ..engine.host_data import local_rows, make_global_arrays
from ..engine.program import BATCH_DTYPES, Program, build
from ..objectives.distillation import top_k_annotator
from ..objectives.loss_heads import target_logprobs, values_fn
from ..objectives.registry import batch_fields

logger = logging.getLogger(__name__)
REFERENCE = "reference_logprobs"


def with_reference_logprobs(program: Program, data: Data, *, samples: Iterable[int]) -> Data:
    """Return `data` with annotations for the training rows `samples` and the held-out rows, if the recipe needs any."""
    config = program.config
    if not config.recipe.precomputes_logprobs:
        return data
    fields = [field for field in batch_fields(config) if field == REFERENCE or program.extra_dimensions(field)]
    logger.info("computing %s of the data, once", " and ".join(fields))
    notes = {field: np.zeros((data.tokens, *program.extra_dimensions(field)), BATCH_DTYPES[field]) for field in fields}
    seen = np.zeros(data.tokens, bool)
    annotate = teacher_annotator(program) if config.recipe.top_k else initial_annotator(program)
    parts: list[tuple[RowSource, Iterable[int]]] = [(data.train, samples)]
    if data.held_out is not None:
        parts.append((data.held_out, range(data.held_out.rows)))
    for dataset, rows in parts:
        for batch in unannotated_batches(dataset, rows, is_annotated=seen, size=config.data.global_batch):
            store_annotations(notes, batch, annotate(batch))
    held_out = None if data.held_out is None else AnnotatedDataset(data.held_out, notes, seen)
    return dataclasses.replace(data, train=AnnotatedDataset(data.train, notes, seen), held_out=held_out)


def initial_annotator(program: Program) -> Annotate:
    """Return a function from at most `global_batch` rows to log p of their targets by the initial weights."""
    if program.config.adapters:  # before training, adapters change nothing: one is enough
        program = build(program.config.model_copy(update={"adapters": {}}), program.mesh)
    config = program.config
    context = partial(make_context, config, program.mesh)
    logprobs = values_fn(target_logprobs(config.model, config.memory), program.graph, context=context)
    forward = lambda weights, batch: {REFERENCE: logprobs(weights, {}, batch, None)}
    return make_annotator(program.initial_weights(), forward, program)


def teacher_annotator(program: Program) -> Annotate:
    """Return a function from at most `global_batch` rows to the teacher's top-k tokens; it holds the teacher."""
    annotate = top_k_annotator(program.config, context=partial(make_context, program.config, program.mesh))
    return make_annotator(program.teacher_weights(), annotate, program)


def make_annotator(weights: Any, forward: Callable[[Any, Batch], dict[str, jax.Array]], program: Program) -> Annotate:
    """Return a function from at most `global_batch` rows to `forward(weights, batch)`, in the order of the rows."""
    config, mesh = program.config, program.mesh
    compiled = jax.jit(forward, out_shardings=NamedSharding(mesh, PartitionSpec()))
    order = token_order(config.data.sequence_length, mesh=mesh, strategy=config.sequence.parallel)
    process_rows = local_rows(config, mesh)

    def annotate(rows: list[Row]) -> Mapping[str, np.ndarray]:
        padded = [*rows, *rows[-1:] * (config.data.global_batch - len(rows))][process_rows]
        batch = {name: np.stack([row[name] for row in padded]) for name in BATCH_FIELDS}
        with jax.set_mesh(mesh):
            outputs = jax.device_get(compiled(weights, make_global_arrays(batch, config, mesh, fields=BATCH_FIELDS)))
        if order is not None:
            outputs = {field: values[:, np.argsort(order)] for field, values in outputs.items()}
        return {field: values[: len(rows)] for field, values in outputs.items()}

    return annotate
