"""What a table means for the engine: which slot each tick reads and writes, and when devices meet. NumPy only.

The engine keeps everything that outlives a tick in pools of slots. A value needs a slot from the tick that makes it to
the last one that reads it, and two values may share one if these do not overlap (`slots.colour`):

    messages    what a stage was sent, or sent itself: from the tick after it was made to the one that reads it
    input       what I reads of F            F .. I      (see `split.py`)
    weight      what W reads of F            F .. W
    stash       what W reads of I            I .. W

The exchanges of vocabulary passes are in `meetings.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ....configs.errors import UserError
from .interval_coloring import colour
from .op_ticks import BACKWARD, Ticks, backward_of, occurrences
from .table import Op, Table
from .vocab_exchanges import Meetings, meetings

NONE = -1
POOLS = {"input": ((Op.F,), BACKWARD), "weight": ((Op.F,), (Op.W, Op.B)), "stash": ((Op.I,), (Op.W,))}


@dataclass(frozen=True)
class Wiring:
    """A table with everything the engine looks up."""

    table: Table
    device: dict[str, np.ndarray]  # field -> int32 [ticks, devices]; slots are -1 where there is nothing to read or put
    meetings: Meetings | None  # what all devices do together; None without vocabulary passes
    slots: dict[str, int]  # pool -> slots of each device
    ways: frozenset[str]  # of `from_before`, `from_after`, `own`: those that are used

    @property
    def ops(self) -> set[Op]:
        """The operations that occur."""
        return {Op(int(number)) for number in np.unique(self.table.op)} - {Op.IDLE}

    @property
    def trains(self) -> bool:
        """Whether there is a backward pass."""
        return not self.ops.isdisjoint(BACKWARD)


def wired(table: Table, *, repeats: tuple[int, ...]) -> Wiring:
    """Wire `table` for a model whose stage s holds `repeats[s]` repeats of the layers' pattern."""
    ticks = occurrences(table)
    device = positions(table, repeats=repeats)
    slots = {}
    for name, (begin, end) in POOLS.items():
        device[name], slots[name] = pool(table, begin, end, ticks)
    met = meetings(table, ticks) if table.algorithm else None
    letters, slots["messages"] = mail(table, ticks, met)
    ways = {name for name in ("from_before", "from_after", "own") if (letters[name] != NONE).any()}
    return Wiring(table, device | letters, met, slots | ({} if met is None else met.slots), frozenset(ways))


def positions(table: Table, *, repeats: tuple[int, ...]) -> dict[str, np.ndarray]:
    """What each device does and where in the model it stands: int32 [ticks, devices] fields."""
    chunk = np.maximum(table.chunk, 0)
    stage = table.placement[np.arange(table.devices)[None, :], chunk]
    busy = np.isin(table.op, (Op.F, Op.I, Op.W, Op.B))
    firsts = np.concatenate([[0], np.cumsum(repeats)[:-1]])
    fields = {
        "op": table.op,
        "microbatch": np.maximum(table.microbatch, 0),
        "chunk": chunk,
        "repeats": np.where(busy, np.asarray(repeats)[stage], 0),
        "first_repeat": firsts[stage],
        "first": busy & (stage == 0),
        "last": busy & (stage == table.stages - 1),
    }
    return {name: field.astype(np.int32) for name, field in fields.items()}


def pool(table: Table, begin: tuple[Op, ...], end: tuple[Op, ...], ticks: Ticks) -> tuple[np.ndarray, int]:
    """Slots for what lives from an op of `begin` to one of `end`: int32 [ticks, devices], and how many a device needs.

    A microbatch's forward pass, I and W name the same slot.
    """
    field, most = np.full(table.op.shape, NONE, np.int32), 0
    for device in range(table.devices):
        lives = []
        for stage in map(int, table.placement[device]):
            for microbatch in range(table.microbatches):
                starts, ends = ([ticks[key] for op in ops if (key := (op, microbatch, stage)) in ticks]
                                for ops in (begin, end))  # fmt: skip
                if starts and ends:
                    lives.append((starts[0], ends[0], microbatch, stage))
        chosen, count = colour([life[:2] for life in lives])
        for (first, last, microbatch, stage), slot in zip(lives, chosen, strict=True):
            between = ticks.get((Op.I, microbatch, stage), last)  # W's slots of F are written by F and not read by I
            field[[first, between, last], device] = slot
        most = max(most, count)
    return field, most


def mail(table: Table, ticks: Ticks, met: Meetings | None) -> tuple[dict[str, np.ndarray], int]:
    """Who puts what arrives in which slot, and who reads which: fields [ticks, devices], and slots a device needs.

    `from_before`, `from_after`, `own`: where a device puts what it was sent at the end of a tick by the device before,
    the one after, and itself. `read`: what the tick's F, I or B works on. `rows`, `head`: see `meetings.py`.
    """
    fields = {name: np.full(table.op.shape, NONE, np.int32)
              for name in ("read", "from_before", "from_after", "own", "rows", "head")}  # fmt: skip
    boxes: list[list[tuple[int, int, int, str]]] = [[] for _ in range(table.devices)]  # from, to, tick put, field
    last = table.stages - 1
    for (op, microbatch, stage), made in ticks.items():
        if op is Op.F:
            reader = stage + 1
            read = ticks.get((Op.F, microbatch, reader))
            if stage == last:  # the head reads it in the backward pass of the same stage
                reader, read = last, None if table.algorithm else backward_of(ticks, microbatch, last)
        elif op in BACKWARD and stage > 0:
            reader = stage - 1
            read = backward_of(ticks, microbatch, reader)
        else:
            continue
        if read is not None:
            source, target = table.device_of(stage), table.device_of(reader)
            boxes[target].append((made + 1, read, made, direction(source, target, table.devices)))
    if met is not None:
        boxes[table.device_of(0)] += [(made, ticks[Op.F, k, 0], made, "rows") for k, made in met.when("rows")]
        boxes[table.device_of(last)] += [
            (made + 1, backward_of(ticks, k, last), made, "head") for k, made in met.when("head")
        ]
    most = 0
    for device, box in enumerate(boxes):
        chosen, count = colour([letter[:2] for letter in box])
        most = max(most, count)
        for (_, read, put, name), slot in zip(box, chosen, strict=True):
            fields[name][put, device] = fields["read"][read, device] = slot
    return fields, most


def direction(source: int, target: int, devices: int) -> str:
    """The field in which `target` finds the slot for what `source` sends. UserError if they are not neighbours."""
    if source == target:
        return "own"
    for name, step in (("from_before", 1), ("from_after", -1)):
        if (source + step) % devices == target:
            return name
    raise UserError(
        f"pipeline.schedule: consecutive stages on devices {source} and {target} of {devices}, which are no neighbours "
        "in a ring; a device sends to the one before and the one behind it, so place stages like that"
    )


def rows_of(wiring: Wiring) -> Mapping[str, np.ndarray]:
    """The fields the engine's loop runs over: int32 [ticks, devices], and [ticks] for meetings."""
    return wiring.device if wiring.meetings is None else wiring.device | wiring.meetings.fields
