"""The reference of recipes that have one: log p of every token by the model as it is before the first step.

    data = referenced(program, data, samples=range(start, stop))

A fixed model's log p of a token depends on its document alone, so one forward pass over what will be read, before
training, is all that is ever needed: no second model stands beside the trained one, a pipeline needs no second pass,
and an adapter's base, a full model and quantized weights are the same to it.
"""

import dataclasses
import logging
from collections.abc import Iterable, Mapping
from functools import partial

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from ..configs.names import BATCH_FIELDS
from ..parallel.attention import token_order
from .data.assemble import Data
from .data.batches import HasRows
from .data.notes import Annotate, Noted, fill, unseen
from .data.rows import Row
from .engines import context, target_logprobs
from .feed import local_rows, to_devices
from .program import Program
from .recipes.registry import RECIPES

logger = logging.getLogger(__name__)
FIELD = "reference_logprobs"


def referenced(program: Program, data: Data, *, samples: Iterable[int]) -> Data:
    """`data` with the field in training rows `samples` and in what is held out; `data` where the recipe has none."""
    if FIELD not in RECIPES[program.config.recipe.name].reads:
        return data
    logger.info("log-probabilities of the reference, once over what will be read")
    notes = {FIELD: np.zeros(data.tokens, np.float32)}
    seen = np.zeros(data.tokens, bool)
    annotate = by_first_weights(program)
    size = program.config.data.global_batch
    parts: list[tuple[HasRows, Iterable[int]]] = [(data.train, samples)]
    if data.held_out is not None:
        parts.append((data.held_out, range(data.held_out.rows)))
    for dataset, rows in parts:
        for some in unseen(dataset, rows, seen=seen, size=size):
            fill(notes, some, annotate(some))
    held_out = None if data.held_out is None else Noted(data.held_out, notes)
    return dataclasses.replace(data, train=Noted(data.train, notes), held_out=held_out)


def by_first_weights(program: Program) -> Annotate:
    """A function from at most `global_batch` rows to log p of their targets by the weights before step 0."""
    config, mesh = program.config, program.mesh
    weights = program.first_weights()
    forward = target_logprobs(config, program.graph, partial(context, config, mesh))
    everywhere = NamedSharding(mesh, PartitionSpec())
    compiled = jax.jit(lambda weights, batch: forward(weights, {}, batch, None), out_shardings=everywhere)
    order = token_order(config.data.sequence_length, mesh=mesh, strategy=config.sequence.parallel)
    mine = local_rows(config, mesh)

    def annotate(rows: list[Row]) -> Mapping[str, np.ndarray]:
        whole = [*rows, *rows[-1:] * (config.data.global_batch - len(rows))][mine]
        batch = {name: np.stack([row[name] for row in whole]) for name in BATCH_FIELDS}
        with jax.set_mesh(mesh):
            found = np.asarray(compiled(weights, to_devices(batch, config, mesh, fields=BATCH_FIELDS)))
        if order is not None:
            found = found[:, np.argsort(order)]
        return {FIELD: found[: len(rows)]}

    return annotate
