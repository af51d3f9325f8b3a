"""Measures how long each op of a pipelined run takes, with the run's own engine on tables of a single op.

    costs = measure_costs(program, params, frozen, batch)    # parallel/pipeline/tables/costs.py, in seconds

The engine runs the rows of a table and does not check whether they are a schedule: rows in which every device only does
F take the time of idle rows plus that of as many F. The result is meaningless, but its time is not.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from functools import partial
from typing import Any

import jax
import numpy as np

from ...configs.errors import MeshwrightError
from ...parallel.compiler_options import compiler_options
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

TICKS = 8  # rows of a measured table; in each of them every device does the op
LONG_TICKS = 40  # rows of a longer idle table, which gives the time of a tick
ROUNDS = 3  # runs whose median counts


def profile_ops(program: Program, state: TrainState, data: Data) -> dict[str, Any]:
    """Return the content of `pipeline.json`: the seconds of each op, and the schedule they were measured for."""
    shard, config, plan = make_process_shard(program), program.config, program.pipeline_plan
    rows = batches(data.train, start=0, global_batch=shard.run_batch, rows=shard.rows, prefetch=config.data.prefetch)
    with closing(rows) as feed:
        batch = make_global_arrays(next(feed), config, program.mesh)
    if isinstance(replicas := program.replicas, Replicas):  # one is enough: times do not depend on the values
        batch = jax.jit(lambda batch: {field: leaf[0] for field, leaf in replicas.split_rows(batch).items()})(batch)
    costs = measure_costs(program, program.eval_params(state), state.frozen, batch)
    return {
        "schedule": plan.table.name,
        "devices": plan.table.devices,
        "repeats": plan.repeats,
        "costs": costs.model_dump(mode="json"),
    }


def measure_costs(program: Program, params: Any, frozen: Any, batch: Any) -> Costs:
    """Return the seconds of each op over all layers of a device, of S and T, of the head's part, and of a tick."""
    plan = program.pipeline_plan
    if plan is None:
        raise MeshwrightError(
            f"mesh.pipe: {program.mesh.shape['pipe']}: only a pipeline has ops to time; use 2 or more"
        )
    lowered = lower_table(plan.table, repeats=plan.repeats)
    idle, long_idle = idle_rows(lowered, ticks=TICKS), idle_rows(lowered, ticks=LONG_TICKS)
    engine = jax.jit(
        lambda params, frozen, batch, rows: program.gradient_engine(params, frozen, batch, None, rows=rows)
    )

    def compile_program(rows: dict[str, np.ndarray]) -> Callable[[dict[str, np.ndarray]], Any]:
        with jax.set_mesh(program.mesh):
            lowered_engine = engine.lower(params, frozen, batch, rows)
            options = compiler_options(program.config.mesh, program.mesh)
            compiled = compile_cache.compile_cached(lowered_engine, program.mesh, options=options)
            return partial(compiled, params, frozen, batch)

    run, run_long = compile_program(idle), compile_program(long_idle)
    base = median_seconds(run, idle)  # a step without any op: gathering, reducing, and TICKS ticks
    tick = max(median_seconds(run_long, long_idle) - base, 0.0) / (LONG_TICKS - TICKS)

    def cost(op: Op, **fields: int) -> float:
        if op not in lowered.ops:
            return 0.0
        rows = busy_rows(idle, op, repeats=plan.max_repeats, slots=lowered.slots, **fields)
        return max(median_seconds(run, rows) - base, 0.0) / TICKS

    times = {op: cost(op) for op in Op if op is not Op.IDLE}
    vocab_parallel = lowered.vocab_exchanges is not None
    backward = Op.B if Op.B in lowered.ops else Op.I
    chunks = plan.table.chunks
    return Costs(
        forward=times[Op.F] * chunks,
        input_gradient=times[backward] * chunks,
        weight_gradient=times[Op.W] * chunks,
        vocabulary_s=times[Op.S] if vocab_parallel else None,
        vocabulary_t=times[Op.T] if vocab_parallel else None,
        head_input_gradient=0.0 if vocab_parallel else max(cost(backward, last=1) - times[backward], 0.0),
        tick=tick,
        stages=tuple(repeats / plan.max_repeats for repeats in plan.repeats),
    )


def idle_rows(lowered: LoweredTable, *, ticks: int) -> dict[str, np.ndarray]:
    """Return rows with the fields of `lowered` in which no device does anything."""
    zeros = ("op", "microbatch", "chunk", "repeats", "first_repeat", "first", "last")  # -1: no slot, no exchange
    return {
        name: np.full((ticks, *field.shape[1:]), 0 if name in zeros else -1, np.int32)
        for name, field in lowered.fields.items()
    }


def busy_rows(
    idle: dict[str, np.ndarray], op: Op, *, repeats: int, slots: Mapping[str, int], last: int = 0
) -> dict[str, np.ndarray]:
    """Return `idle` rows in which every device does `op` over `repeats` repeats; `last` is 1 for the last stage.

    Each tick uses the next slot of every pool, as in a schedule: a slot that is used again would still be in a cache.
    """
    tick = np.arange(len(idle["op"]))[:, None]
    pools = {"input": "input", "weight": "weight", "stash": "stash", "read": "messages"}
    values = {"op": op, "repeats": repeats, "last": last}
    values |= {name: tick % max(slots[pool], 1) for name, pool in pools.items()}
    return idle | {name: np.full_like(idle[name], value) for name, value in values.items()}


def median_seconds(compiled: Any, rows: dict[str, np.ndarray]) -> float:
    """Return the median seconds of ROUNDS runs over `rows`."""
    seconds = []
    for _ in range(ROUNDS + 1):  # the first run warms up
        began = time.perf_counter()
        jax.block_until_ready(compiled(rows))
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:])
