"""Simulation of a table with given costs of ops: time, idle share, activations. NumPy only.

There are two clocks. Asynchronous: a device starts its next pass as soon as what it needs is there, as separate
programs do. Lock-step: all devices end a tick together, so a tick costs its slowest device, as in one program. On a
simulated mesh with fewer cores than devices a tick also takes at least its total work divided by the cores.

There are two idle shares. `bubble` counts from the first pass of any device to the last of any: devices synchronize
between steps. `bubble_between_steps` counts each device from its own first pass to its own last: what remains when the
next step's first passes follow at once, as with the post-validated optimizer of Zero Bubble (arXiv:2401.10241), whose
definition it is.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np

from ....configs.errors import UserError
from .costs import Costs
from .dependencies import Event, event_of, produced_events, required_events, table_passes
from .table import VOCABULARY_OPS, Op, Table


@dataclass(frozen=True, eq=False)
class Timeline:
    """A table on the clock. Times are in the unit of the costs."""

    start: np.ndarray  # [ticks, devices], asynchronous; nan where idle
    end: np.ndarray  # [ticks, devices]
    busy: np.ndarray  # [devices] time spent in passes
    makespan: float  # asynchronous, until the last device is done
    lockstep: float  # lock-step, until the last tick is done
    in_flight: np.ndarray  # [devices] most activations held, in microbatches of all the device's stages

    @property
    def bubble(self) -> float:
        """Idle share of all devices until the last one is done."""
        return 1 - float(self.busy.mean()) / self.makespan

    @property
    def bubble_between_steps(self) -> float:
        """Idle share when each device is counted from its own first pass to its last."""
        spans = np.nanmax(self.end, axis=0) - np.nanmin(self.start, axis=0)
        return 1 - float(self.busy.mean()) / float(spans.max())

    @property
    def lockstep_bubble(self) -> float:
        """Idle share under the lock-step clock."""
        return 1 - float(self.busy.mean()) / self.lockstep


def simulate(table: Table, costs: Costs | None = None, *, cores: int | None = None) -> Timeline:
    """The table's timeline. `cores` compute for all devices of a simulated mesh; None: each device has its own.

    Raises UserError where `costs.stages` does not have a factor for each stage.
    """
    costs = costs or Costs()
    if costs.stages is not None and len(costs.stages) != table.stages:
        raise UserError(f"costs.stages: {len(costs.stages)} factors, but {table.name} has {table.stages} stages; "
                        f"give one factor for each stage")  # fmt: skip
    duration = durations(table, costs)
    start, end = _asynchronous(table, duration, costs.communication)
    ticks = duration.max(axis=1)
    if cores is not None:
        ticks = np.maximum(ticks, duration.sum(axis=1) / cores)
    overhead = table.ticks * (costs.communication + costs.tick)
    return Timeline(
        start, end, busy=duration.sum(axis=0), makespan=float(np.nanmax(end)),
        lockstep=float(ticks.sum()) + overhead, in_flight=in_flight(table),
    )  # fmt: skip


def durations(table: Table, costs: Costs) -> np.ndarray:
    """The time of each cell [ticks, devices]; 0 where idle."""
    pass_time = cache(lambda op, stage: costs.pass_time(op, stage=stage, table=table))
    result = np.zeros(table.op.shape)
    for tick, device, step in table_passes(table):
        stage = None if step.op in VOCABULARY_OPS else int(table.placement[device, step.chunk])
        result[tick, device] = pass_time(step.op, stage)
    return result


def _asynchronous(table: Table, duration: np.ndarray, communication: float) -> tuple[np.ndarray, np.ndarray]:
    """Start and end of each cell when every device starts each pass as soon as it can."""
    start, end = np.full(table.op.shape, np.nan), np.full(table.op.shape, np.nan)
    shape = {"stages": table.stages, "devices": table.devices, "algorithm": table.algorithm}
    free = [0.0] * table.devices
    completed: dict[Event, tuple[float, int]] = {}  # -> time, device
    for tick, device, step in table_passes(table):
        event = event_of(step, device=device, placement=table.placement)
        begin = free[device]
        for required in required_events(event, **shape):
            ready, producer = completed[required]
            begin = max(begin, ready + (communication if producer != device else 0.0))
        free[device] = begin + duration[tick, device]
        start[tick, device], end[tick, device] = begin, free[device]
        completed.update((produced, (free[device], device)) for produced in produced_events(event))
    return start, end


def in_flight(table: Table) -> np.ndarray:
    """Most activations each device holds [devices], in microbatches of all its stages: a chunk counts as its share."""
    return stash_bytes(table, weight=1.0) / table.chunks


def stash_bytes(table: Table, *, input: float = 0.0, weight: float = 0.0, stash: float = 0.0) -> np.ndarray:
    """Most bytes each device holds, [devices], from the bytes of one microbatch and stage.

    `input`: from F to I; `weight`: from F to W; `stash`: made by I, kept until W. Published tables have M_B = `input` +
    `weight` and M_W = `weight`, and count no `stash`.
    """
    return sum(_held_bytes(table, input=input, weight=weight, stash=stash).values()).max(axis=0)


def pool_bytes(table: Table, *, input: float, weight: float, stash: float) -> float:
    """Bytes that every device of one program allocates: each pool as large as the device that needs most of it.

    Arguments as in `stash_bytes`. The three pools need not be fullest in the same tick. Values in host memory have
    pools of their own: call this once with their bytes, and once with the bytes of what stays on the device.
    """
    return sum(float(held.max()) for held in _held_bytes(table, input=input, weight=weight, stash=stash).values())


def _held_bytes(table: Table, **sizes: float) -> dict[str, np.ndarray]:
    """Bytes of each pool that devices hold after a tick, [ticks, devices]."""
    begin = {"input": (Op.F,), "weight": (Op.F,), "stash": (Op.I,)}
    end = {"input": (Op.I, Op.B), "weight": (Op.W, Op.B), "stash": (Op.W,)}
    trains = np.isin(table.op, (Op.W, Op.B)).any()
    held = {}
    for name, size in sizes.items():
        change = np.isin(table.op, begin[name]).astype(float) - np.isin(table.op, end[name])
        # Without a backward pass nothing outlives its F.
        held[name] = size * (np.cumsum(change, axis=0) if trains else np.maximum(change, 0))
    return held
