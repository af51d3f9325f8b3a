"""A table lowered to what the executor reads: the slots of every tick, and its exchanges. NumPy only.

The executor keeps every value that outlives a tick in a pool of slots. A value needs a slot from the tick that makes it
to the last tick that reads it; two values share one if these ticks do not overlap (`interval_coloring.py`):

    messages    what was sent to a stage: from the tick after it was made to the tick that reads it
    input       what I reads of F            F .. I      (see `executor/backward_split.py`)
    weight      what W reads of F            F .. W
    stash       what W reads of I            I .. W

The exchanges of vocabulary passes are in `vocab_exchanges.py`.
"""

from dataclasses import dataclass

import numpy as np

from ....configs.errors import UserError
from .interval_coloring import color_intervals
from .op_ticks import BACKWARD, Ticks, backward_tick, op_ticks
from .table import VOCABULARY_OPS, Op, Table
from .vocab_exchanges import VocabExchanges, schedule_exchanges

NONE = -1
POOLS = {"input": ((Op.F,), BACKWARD), "weight": ((Op.F,), (Op.W, Op.B)), "stash": ((Op.I,), (Op.W,))}
DIRECTIONS = {"from_self": 0, "from_previous": 1, "from_next": -1}  # field -> step from sender to receiver


@dataclass(frozen=True)
class LoweredTable:
    """A table with all fields that the executor reads."""

    table: Table
    device_fields: dict[str, np.ndarray]  # name -> int32 [ticks, devices]; -1 where no slot is read or written
    vocab_exchanges: VocabExchanges | None  # None without vocabulary passes
    slots: dict[str, int]  # pool -> slots of each device
    directions: frozenset[str]  # those of DIRECTIONS in which anything is sent

    @property
    def ops(self) -> set[Op]:
        """The ops that occur."""
        return {Op(int(number)) for number in np.unique(self.table.op)} - {Op.IDLE}

    @property
    def trains(self) -> bool:
        """Whether there is a backward pass."""
        return not self.ops.isdisjoint(BACKWARD)

    @property
    def fields(self) -> dict[str, np.ndarray]:
        """The fields that the executor's loop runs over: int32 [ticks, devices], and [ticks] for exchanges."""
        return self.device_fields | ({} if self.vocab_exchanges is None else self.vocab_exchanges.fields)


def lower_table(table: Table, *, repeats: tuple[int, ...]) -> LoweredTable:
    """Lower `table` for a model whose stage s holds `repeats[s]` repeats of the layer pattern."""
    ticks = op_ticks(table)
    fields = position_fields(table, repeats=repeats)
    slots = {}
    for name, (begin, end) in POOLS.items():
        fields[name], slots[name] = pool_slots(table, begin, end, ticks)
    exchanges = schedule_exchanges(table, ticks) if table.algorithm else None
    messages, slots["messages"] = message_slots(table, ticks, exchanges)
    directions = frozenset(name for name in DIRECTIONS if (messages[name] != NONE).any())
    slots |= {} if exchanges is None else exchanges.slots
    return LoweredTable(table, fields | messages, exchanges, slots, directions)


def position_fields(table: Table, *, repeats: tuple[int, ...]) -> dict[str, np.ndarray]:
    """What each device does, and its position in the model: int32 [ticks, devices] fields."""
    chunk = np.maximum(table.chunk, 0)
    stage = table.placement[np.arange(table.devices)[None, :], chunk]
    busy = ~np.isin(table.op, (Op.IDLE, *VOCABULARY_OPS))
    first_repeats = np.concatenate([[0], np.cumsum(repeats)[:-1]])
    fields = {
        "op": table.op,
        "microbatch": np.maximum(table.microbatch, 0),
        "chunk": chunk,
        "repeats": np.where(busy, np.asarray(repeats)[stage], 0),
        "first_repeat": first_repeats[stage],
        "first": busy & (stage == 0),
        "last": busy & (stage == table.stages - 1),
    }
    return {name: field.astype(np.int32) for name, field in fields.items()}


def pool_slots(table: Table, begin: tuple[Op, ...], end: tuple[Op, ...], ticks: Ticks) -> tuple[np.ndarray, int]:
    """Slots of what lives from an op of `begin` to one of `end`: int32 [ticks, devices], and how many a device needs.

    F, I and W of a microbatch name the same slot.
    """
    field, most = np.full(table.op.shape, NONE, np.int32), 0
    for device in range(table.devices):
        lifetimes = []
        for stage in map(int, table.placement[device]):
            for microbatch in range(table.microbatches):
                starts, ends = ([ticks[key] for op in ops if (key := (op, microbatch, stage)) in ticks]
                                for ops in (begin, end))  # fmt: skip
                if starts and ends:
                    lifetimes.append((starts[0], ends[0], microbatch, stage))
        slots, count = color_intervals([lifetime[:2] for lifetime in lifetimes])
        for (start, end_tick, microbatch, stage), slot in zip(lifetimes, slots, strict=True):
            between = ticks.get((Op.I, microbatch, stage), end_tick)  # F writes the slots of `weight`, I does not read
            field[[start, between, end_tick], device] = slot
        most = max(most, count)
    return field, most


def message_slots(table: Table, ticks: Ticks, exchanges: VocabExchanges | None) -> tuple[dict[str, np.ndarray], int]:
    """Slots in which messages arrive and are read: fields [ticks, devices], and how many slots a device needs.

    `from_self`, `from_previous`, `from_next`: where a device stores what it receives at the end of a tick from itself,
    from the previous and from the next device. `read`: the message that the tick's F, I or B works on. `embed`,
    `head_gradient`: where the exchanges of these kinds store theirs.
    """
    fields = {name: np.full(table.op.shape, NONE, np.int32) for name in ("read", *DIRECTIONS, "embed", "head_gradient")}
    # [device] -> (first tick, last tick, tick of writing, field)
    lifetimes: list[list[tuple[int, int, int, str]]] = [[] for _ in range(table.devices)]
    last = table.stages - 1
    for (op, microbatch, stage), tick in ticks.items():
        if op is Op.F:
            reader = stage + 1
            read = ticks.get((Op.F, microbatch, reader))
            if stage == last:  # the head reads it in the backward pass of the same stage
                reader, read = last, None if table.algorithm else backward_tick(ticks, microbatch, last)
        elif op in BACKWARD and stage > 0:
            reader = stage - 1
            read = backward_tick(ticks, microbatch, reader)
        else:
            continue
        if read is not None:
            source, target = table.device_of(stage), table.device_of(reader)
            lifetimes[target].append((tick + 1, read, tick, direction(source, target, table.devices)))
    if exchanges is not None:
        lifetimes[table.device_of(0)] += [
            (tick, ticks[Op.F, k, 0], tick, "embed") for k, tick in exchanges.ticks_of("embed")
        ]
        lifetimes[table.device_of(last)] += [
            (tick + 1, backward_tick(ticks, k, last), tick, "head_gradient")
            for k, tick in exchanges.ticks_of("head_gradient")
        ]
    most = 0
    for device, messages in enumerate(lifetimes):
        slots, count = color_intervals([message[:2] for message in messages])
        most = max(most, count)
        for (_, read, written, name), slot in zip(messages, slots, strict=True):
            fields[name][written, device] = fields["read"][read, device] = slot
    return fields, most


def direction(source: int, target: int, devices: int) -> str:
    """The field with the slot in which `target` stores what `source` sends. UserError if they are not neighbours."""
    if source == target:
        return "from_self"
    for name, step in DIRECTIONS.items():
        if (source + step) % devices == target:
            return name
    raise UserError(
        f"pipeline.schedule: consecutive stages are on devices {source} and {target} of {devices}, which are not "
        "neighbours in a ring; a device sends only to the previous and the next one, so place stages on neighbours"
    )
