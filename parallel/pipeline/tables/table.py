"""A pipeline schedule is a table [tick, device] -> (op, microbatch, chunk, slot). NumPy only.

A model is split into `stages` consecutive parts, which run on `devices`. A device holds `chunks` stages, given by
`placement`. Time is counted in ticks: an op takes one tick, and its result can be used from the next tick on.

    F  forward of a stage                   needs the F of the previous stage
    I  gradient of the stage's input        needs its own F, and the I of the next stage
    W  gradient of the stage's weights      needs its own I; nothing waits for it, so it fills gaps
    B  I and W in one op (a fused backward)
    S  vocabulary pass: logits of a shard   on every device, needs the F of the last stage
    T  vocabulary pass: their gradient      on every device, needs the S of all devices

Without vocabulary passes the last stage computes head and loss inside its own I. With them its I waits for all S
(`algorithm` 2, one barrier) or all T (`algorithm` 1, two barriers).

A `slot` is the index in a device's pool of activations that (microbatch, chunk) occupies from its F to its last use.

Sources: Zero Bubble Pipeline Parallelism (arXiv:2401.10241) for I and W, Balancing Pipeline Parallelism with Vocabulary
Parallelism (arXiv:2411.05288) for S and T.
"""

import enum
from dataclasses import dataclass, fields
from functools import cached_property

import numpy as np


class Op(enum.IntEnum):
    """What a device does in a tick."""

    IDLE = 0
    F = 1
    I = 2  # noqa: E741 - the papers' names
    W = 3
    B = 4
    S = 5
    T = 6


VOCABULARY_OPS = (Op.S, Op.T)  # every device does them on its vocabulary shard; they belong to no chunk


@dataclass(frozen=True, eq=False)
class Table:
    """A schedule. Arrays are integers [ticks, devices]; microbatch, chunk and slot are -1 where there is none."""

    op: np.ndarray  # values of Op
    microbatch: np.ndarray
    chunk: np.ndarray  # of the device's own chunks; -1 also for S and T
    slot: np.ndarray  # in the device's pool, the same number at F, I, W and B; -1 also for S and T
    placement: np.ndarray  # [devices, chunks] -> stage; each of 0 .. devices * chunks - 1 appears once
    microbatches: int
    algorithm: int  # 0: no vocabulary passes; 1 or 2: those of the paper
    name: str

    @property
    def ticks(self) -> int:
        """Rows of the table: its duration when every op takes one tick."""
        return self.op.shape[0]

    @property
    def devices(self) -> int:
        """Columns of the table: the size of the mesh axis `pipe`."""
        return self.op.shape[1]

    @property
    def chunks(self) -> int:
        """Stages on each device."""
        return self.placement.shape[1]

    @property
    def stages(self) -> int:
        """Parts that the model is split into."""
        return self.placement.size

    @cached_property
    def slots(self) -> np.ndarray:
        """Size of each device's pool of activations, int [devices]: its largest slot number plus one."""
        return self.slot.max(axis=0, initial=-1) + 1

    @cached_property
    def _stage_device(self) -> np.ndarray:
        return np.argsort(self.placement, axis=None) // self.chunks  # [stage]

    def device_of(self, stage: int) -> int:
        """The device that runs `stage`."""
        return int(self._stage_device[stage])

    def ticks_of(self, op: Op) -> dict[tuple[int, int], int]:
        """{(microbatch, stage): tick} of an op; {(microbatch, device): tick} of S and T."""
        ticks, devices = np.nonzero(self.op == op)
        locations = devices if op in VOCABULARY_OPS else self.placement[devices, self.chunk[ticks, devices]]
        microbatches = self.microbatch[ticks, devices]
        return dict(zip(zip(microbatches.tolist(), locations.tolist(), strict=True), ticks.tolist(), strict=True))

    def equals(self, table: "Table") -> bool:
        """Whether `table` is the same schedule, name included."""
        return all(np.array_equal(getattr(self, field.name), getattr(table, field.name)) for field in fields(self))
