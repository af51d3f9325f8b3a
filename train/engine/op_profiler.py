"""How long each op of a pipelined run really takes: the run's own engine, given tables in which all do the same.

    costs = op_times(program, params, frozen, batch)    # parallel/pipeline/tables/costs.py, in seconds

The engine does what its rows say, and does not ask whether they make a schedule: rows in which every device does F, and
nothing else, take the time of idle rows and of as many F. What comes out is worth nothing; how long it took is.
"""

import statistics
import time
from collections.abc import Mapping
from contextlib import closing
from functools import partial
from typing import Any

import jax
import numpy as np

from ...configs.errors import MeshwrightError
from ...parallel.pipeline.tables.costs import Costs
from ...parallel.pipeline.tables.lowering import LoweredTable, lower_table
from ...parallel.pipeline.tables.table import Op
from ...parallel.state import TrainState
from ..data.assemble import Data
from ..data.batches import batches
from . import compile_cache
from .host_data import make_global_arrays, make_process_shard
from .program import Program
from .replicas import Replicas

TICKS = 8  # of the rows that are run; in all of them all devices do the op
LONGER = 40  # rows in which nobody does anything, for the time of a tick
ROUNDS = 3


def profile_ops(program: Program, state: TrainState, data: Data) -> dict[str, Any]:
    """What `pipeline.json` holds: each op's seconds, and the schedule they were measured for."""
    share, config = make_process_shard(program), program.config
    rows = batches(data.train, start=0, global_batch=share.run_batch, rows=share.rows, prefetch=config.data.prefetch)
    with closing(rows) as feed:
        batch = make_global_arrays(next(feed), config, program.mesh)
    if isinstance(replicas := program.replicas, Replicas):  # all do the same, and no time depends on the numbers
        batch = jax.jit(lambda batch: {field: leaf[0] for field, leaf in replicas.split_rows(batch).items()})(batch)
    costs = measure_costs(program, program.eval_params(state), state.frozen, batch)
    staging = program.pipeline_plan
    return {
        "schedule": staging.table.name,
        "devices": staging.table.devices,
        "repeats": staging.repeats,
        "costs": costs.model_dump(mode="json"),
    }


def measure_costs(program: Program, params: Any, frozen: Any, batch: Any) -> Costs:
    """Seconds of each op over all layers of a device, of S and T, of what the head adds, and of a tick."""
    staging = program.pipeline_plan
    if staging is None:
        raise MeshwrightError(f"mesh.pipe: {program.mesh.shape['pipe']}: only a pipeline has ops to time")
    wiring = lower_table(staging.table, repeats=staging.repeats)
    idle, longer = idle_rows(wiring, ticks=TICKS), idle_rows(wiring, ticks=LONGER)
    with jax.set_mesh(program.mesh):
        engine = jax.jit(
            lambda params, frozen, batch, rows: program.gradient_engine(params, frozen, batch, None, rows=rows)
        )
        short, stretched = (
            partial(
                compile_cache.compile_cached(engine.lower(params, frozen, batch, rows), program.mesh),
                params,
                frozen,
                batch,
            )
            for rows in (idle, longer)
        )
    base = median_seconds(short, idle)  # what a step costs without any op: gathering, reducing, and some ticks
    tick = max(median_seconds(stretched, longer) - base, 0.0) / (LONGER - TICKS)

    def cost(op: Op, **fields: int) -> float:
        if op not in wiring.ops:
            return 0.0
        rows = busy_rows(idle, op, repeats=staging.max_repeats, slots=wiring.slots, **fields)
        return max(median_seconds(short, rows) - base, 0.0) / TICKS

    times = {op: cost(op) for op in Op if op is not Op.IDLE}
    whole = wiring.vocab_exchanges is None
    backward = Op.B if Op.B in wiring.ops else Op.I
    head = max(cost(backward, last=1) - times[backward], 0.0) if whole else 0.0
    chunks = staging.table.chunks
    return Costs(
        forward=times[Op.F] * chunks,
        input_gradient=times[backward] * chunks,
        weight_gradient=times[Op.W] * chunks,
        vocabulary_s=None if whole else times[Op.S],
        vocabulary_t=None if whole else times[Op.T],
        head_input_gradient=head,
        tick=tick,
        stages=tuple(repeats / staging.max_repeats for repeats in staging.repeats),
    )


def idle_rows(wiring: LoweredTable, *, ticks: int) -> dict[str, np.ndarray]:
    """Rows like those of `wiring`, with nothing to do in any tick."""
    kept = -1  # no slot, no meeting
    zeros = ("op", "microbatch", "chunk", "repeats", "first_repeat", "first", "last")
    return {
        name: np.full((ticks, *field.shape[1:]), 0 if name in zeros else kept, np.int32)
        for name, field in wiring.fields.items()
    }


def busy_rows(
    idle: dict[str, np.ndarray], op: Op, *, repeats: int, slots: Mapping[str, int], last: int = 0
) -> dict[str, np.ndarray]:
    """`idle` rows in which every device does `op` over `repeats` repeats, as the last stage or not.

    Each tick has the next slot of every pool, as in a schedule: a slot that is used again stays in a cache.
    """
    turn = np.arange(len(idle["op"]))[:, None]
    pools = {"input": "input", "weight": "weight", "stash": "stash", "read": "messages"}
    wanted = {"op": op, "repeats": repeats, "last": last}
    wanted |= {name: turn % max(slots[pool], 1) for name, pool in pools.items()}
    return idle | {name: np.full_like(idle[name], value) for name, value in wanted.items()}


def median_seconds(compiled: Any, rows: dict[str, np.ndarray]) -> float:
    """The median time of a run over `rows`."""
    found = []
    for _ in range(ROUNDS + 1):  # the first warms up
        began = time.perf_counter()
        jax.block_until_ready(compiled(rows))
        found.append(time.perf_counter() - began)
    return statistics.median(found[1:])
