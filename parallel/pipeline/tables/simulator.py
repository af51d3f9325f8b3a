"""What a table takes when ops cost what they cost: time, idle share, activations. NumPy only.

Two clocks. Asynchronous: a device goes on as soon as its next pass has what it needs, as separate programs do. Lock-
step: all devices end a tick together, so a tick costs its slowest device, as in one program; on fewer cores than
devices a tick also takes at least all its work divided by the cores, which is what a simulated mesh does.

Two idle shares, too. `bubble` counts from the first pass of any device to the last: devices meet between steps.
`bubble_between_steps` counts each device from its own first pass to its own last: what is left when the next step's
first passes follow at once, as with the post-validated optimizer of Zero Bubble (arXiv:2401.10241), which counts like
that.
"""

from dataclasses import dataclass

import numpy as np

from ....configs.errors import UserError
from .costs import Costs
from .dependencies import Event, Pass, event, made, needs
from .table import VOCABULARY_OPS, Op, Table


@dataclass(frozen=True, eq=False)
class Timeline:
    """A table on the clock. Times in the unit of the costs."""

    start: np.ndarray  # [ticks, devices], asynchronous; nan where idle
    end: np.ndarray  # [ticks, devices]
    busy: np.ndarray  # [devices] time spent in passes
    makespan: float  # asynchronous, until the last device is done
    lockstep: float  # until the last tick is done
    in_flight: np.ndarray  # [devices] activations held at most, in microbatches of all the device's stages

    @property
    def bubble(self) -> float:
        """Idle share of all devices until the last is done."""
        return 1 - float(self.busy.mean()) / self.makespan

    @property
    def bubble_between_steps(self) -> float:
        """Idle share when each device counts from its own first pass to its last."""
        spans = np.nanmax(self.end, axis=0) - np.nanmin(self.start, axis=0)
        return 1 - float(self.busy.mean()) / float(spans.max())

    @property
    def lockstep_bubble(self) -> float:
        """Idle share under the lock-step clock."""
        return 1 - float(self.busy.mean()) / self.lockstep


def simulate(table: Table, costs: Costs | None = None, *, cores: int | None = None) -> Timeline:
    """The table's timeline; `cores` that compute for all devices of a simulated mesh, None: each device has its own.

    Raises UserError where `costs.stages` does not have a factor for each stage.
    """
    costs = costs or Costs()
    if costs.stages is not None and len(costs.stages) != table.stages:
        raise UserError(f"costs.stages: {len(costs.stages)} factors for the {table.stages} stages of {table.name}; "
                        f"give one for each")  # fmt: skip
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
    known: dict[tuple[int, int], float] = {}
    result = np.zeros(table.op.shape)
    for tick, device in np.argwhere(table.op != Op.IDLE).tolist():
        op = Op(table.op[tick, device])
        stage = -1 if op in VOCABULARY_OPS else int(table.placement[device, table.chunk[tick, device]])
        if (op, stage) not in known:
            known[op, stage] = costs.of(op, stage=None if stage < 0 else stage, table=table)
        result[tick, device] = known[op, stage]
    return result


def _asynchronous(table: Table, duration: np.ndarray, communication: float) -> tuple[np.ndarray, np.ndarray]:
    """Start and end of each cell when every device goes on as soon as it can."""
    start, end = np.full(table.op.shape, np.nan), np.full(table.op.shape, np.nan)
    shape = {"stages": table.stages, "devices": table.devices, "algorithm": table.algorithm}
    free = [0.0] * table.devices
    done: dict[Event, tuple[float, int]] = {}  # when, on which device
    for tick, device in np.argwhere(table.op != Op.IDLE).tolist():
        one = Pass(*(int(array[tick, device]) for array in (table.op, table.microbatch, table.chunk)))
        named = event(one._replace(op=Op(one.op)), device=device, placement=table.placement)
        begin = free[device]
        for need in needs(named, **shape):
            ready, where = done[need]
            begin = max(begin, ready + (communication if where != device else 0.0))
        free[device] = begin + duration[tick, device]
        start[tick, device], end[tick, device] = begin, free[device]
        done.update((result, (free[device], device)) for result in made(named))
    return start, end


def in_flight(table: Table) -> np.ndarray:
    """Activations each device holds at most [devices], in microbatches of all its stages: chunks count as parts."""
    return stash_bytes(table, weight=1.0) / table.chunks


def stash_bytes(table: Table, *, input: float = 0.0, weight: float = 0.0, stash: float = 0.0) -> np.ndarray:
    """Bytes each device holds at most, [devices], by those of one microbatch and stage.

    `input`: from F to I; `weight`: from F to W; `stash`: made by I, kept until W. Published tables have M_B = `input` +
    `weight` and M_W = `weight`, and count no `stash`.
    """
    return sum(_held(table, input=input, weight=weight, stash=stash).values()).max(axis=0)


def pool_bytes(table: Table, *, input: float, weight: float, stash: float) -> float:
    """Bytes every device sets aside in one program: each pool as large as the device that needs most of it.

    What waits in host memory is in pools of its own there: ask for them with its bytes, and for the others with theirs.

    Arguments as in `stash_bytes`. The three are pools of their own, which are not at their fullest in the same tick.
    """
    return sum(float(held.max()) for held in _held(table, input=input, weight=weight, stash=stash).values())


def _held(table: Table, **each: float) -> dict[str, np.ndarray]:
    """Bytes of each kind that devices hold after a tick, [ticks, devices]."""
    begin = {"input": (Op.F,), "weight": (Op.F,), "stash": (Op.I,)}
    end = {"input": (Op.I, Op.B), "weight": (Op.W, Op.B), "stash": (Op.W,)}
    trains = np.isin(table.op, (Op.W, Op.B)).any()
    found = {}
    for name, size in each.items():
        change = np.isin(table.op, begin[name]).astype(float) - np.isin(table.op, end[name])
        # A forward alone is over when it is over.
        found[name] = size * (np.cumsum(change, axis=0) if trains else np.maximum(change, 0))
    return found
