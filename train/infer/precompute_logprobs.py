"""What a fixed model says of every token that will be read, noted once before the first step.

    data = referenced(program, data, samples=range(start, stop))

Of recipes that compare with the model as it is before the first step: log p of every token by it. Of those that learn
from a teacher's likeliest words: these. A fixed model's words depend on a token's own document alone, so one forward
pass over what will be read, before training, is all that is ever needed: no second model stands beside the trained
one, a pipeline needs no second pass, and an adapter's base, a full model and quantized weights are the same to it.
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
from ..data.batches import HasRows
from ..data.rows import Row
from ..data.token_annotations import Annotate, Noted, fill, unseen
from ..engine.forward_backward import make_context
from ..engine.host_data import local_rows, make_global_arrays
from ..engine.program import BATCH_DTYPES, Program, build
from ..objectives.distillation import top_k_annotator
from ..objectives.loss_heads import target_logprobs, values_fn
from ..objectives.registry import batch_fields

logger = logging.getLogger(__name__)
REFERENCE = "reference_logprobs"


def referenced(program: Program, data: Data, *, samples: Iterable[int]) -> Data:
    """`data` with the notes in training rows `samples` and in what is held out; `data` where the recipe has none."""
    config = program.config
    if not config.recipe.reads_ahead:
        return data
    noted = [field for field in batch_fields(config) if field == REFERENCE or program.extra_dimensions(field)]
    logger.info("%s, once over what will be read", " and ".join(noted))
    notes = {field: np.zeros((data.tokens, *program.extra_dimensions(field)), BATCH_DTYPES[field]) for field in noted}
    seen = np.zeros(data.tokens, bool)
    annotate = by_teacher(program) if config.recipe.top_k else by_first_weights(program)
    parts: list[tuple[HasRows, Iterable[int]]] = [(data.train, samples)]
    if data.held_out is not None:
        parts.append((data.held_out, range(data.held_out.rows)))
    for dataset, rows in parts:
        for some in unseen(dataset, rows, seen=seen, size=config.data.global_batch):
            fill(notes, some, annotate(some))
    held_out = None if data.held_out is None else Noted(data.held_out, notes, seen)
    return dataclasses.replace(data, train=Noted(data.train, notes, seen), held_out=held_out)


def by_first_weights(program: Program) -> Annotate:
    """A function from at most `global_batch` rows to log p of their targets by the weights before step 0."""
    if program.config.adapters:  # which are nothing yet: one is as good as several
        program = build(program.config.model_copy(update={"adapters": {}}), program.mesh)
    config = program.config
    told = partial(make_context, config, program.mesh)
    forward = values_fn(target_logprobs(config.model, config.memory), program.graph, context=told)
    return by(program.initial_weights(), lambda weights, batch: {REFERENCE: forward(weights, {}, batch, None)}, program)


def by_teacher(program: Program) -> Annotate:
    """A function from at most `global_batch` rows to the likeliest words of the teacher, which it holds."""
    note = top_k_annotator(program.config, context=partial(make_context, program.config, program.mesh))
    return by(program.teacher_weights(), note, program)


def by(weights: Any, forward: Callable[[Any, Batch], dict[str, jax.Array]], program: Program) -> Annotate:
    """A function from at most `global_batch` rows to what `forward(weights, batch)` says of them, in their order."""
    config, mesh = program.config, program.mesh
    compiled = jax.jit(forward, out_shardings=NamedSharding(mesh, PartitionSpec()))
    order = token_order(config.data.sequence_length, mesh=mesh, strategy=config.sequence.parallel)
    mine = local_rows(config, mesh)

    def annotate(rows: list[Row]) -> Mapping[str, np.ndarray]:
        whole = [*rows, *rows[-1:] * (config.data.global_batch - len(rows))][mine]
        batch = {name: np.stack([row[name] for row in whole]) for name in BATCH_FIELDS}
        with jax.set_mesh(mesh):
            found = jax.device_get(compiled(weights, make_global_arrays(batch, config, mesh, fields=BATCH_FIELDS)))
        if order is not None:
            found = {field: values[:, np.argsort(order)] for field, values in found.items()}
        return {field: values[: len(rows)] for field, values in found.items()}

    return annotate
