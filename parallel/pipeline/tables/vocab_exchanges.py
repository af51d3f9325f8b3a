"""The exchanges of vocabulary passes: all devices take part, in ticks that the table alone decides. NumPy only.

Each happens for one microbatch at a time, at the end of a tick unless said otherwise:

    rows        start of a tick: every device looks up its rows of the embedding, their sum is stage 0's input. Right
                after stage 0 began the microbatch before, one interval ahead of the pass that reads it
    broadcast   (C0) the last stage's output goes to all, after its forward pass
    combine     (C1) maxima, sums and targets' scores are put together, after the last S
    head        the last stage gets the gradient of its output: with `combine` (Algorithm 2), or after the last T (C2)
    returned    stage 0's gradient of its input goes to all, which add it to their rows, after its backward pass

What waits in between is in pools whose slots are alike on all devices: `hidden` (the broadcast output, read by S, T and
the last stage's backward pass), `scores` (from S to T), `partial` (a device's part of `head`, Algorithm 1).
Source: Balancing Pipeline Parallelism with Vocabulary Parallelism, arXiv:2411.05288, section 4.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from .interval_coloring import colour
from .op_ticks import Ticks, backward_of
from .table import Op, Table

KINDS = ("rows", "broadcast", "combine", "head", "returned")


@dataclass(frozen=True)
class Meetings:
    """When which microbatch meets, and the pools in between."""

    microbatch: dict[str, np.ndarray]  # kind -> int32 [ticks], -1: none
    slot: dict[str, np.ndarray]  # pool -> int32 [microbatches]
    slots: dict[str, int]  # pool -> how many

    def when(self, kind: str) -> Iterator[tuple[int, int]]:
        """(microbatch, tick) of every meeting of a kind."""
        return ((int(self.microbatch[kind][tick]), int(tick)) for tick in np.flatnonzero(self.microbatch[kind] >= 0))

    @property
    def fields(self) -> dict[str, np.ndarray]:
        """Kind -> int32 [ticks], under names that do not clash with a device's fields."""
        return {f"meet_{kind}": field for kind, field in self.microbatch.items()}


def meetings(table: Table, ticks: Ticks) -> Meetings:
    """When the devices of `table` meet."""
    field = {kind: np.full(table.ticks, -1, np.int32) for kind in KINDS}
    last = table.stages - 1
    order = sorted(range(table.microbatches), key=lambda k: ticks[Op.F, k, 0])
    field["rows"][ticks[Op.F, order[0], 0]] = order[0]
    for before, microbatch in pairwise(order):
        field["rows"][ticks[Op.F, before, 0] + 1] = microbatch
    lives: dict[str, list[tuple[int, int]]] = {"hidden": [], "scores": [], "partial": []}
    for microbatch in range(table.microbatches):
        arrived = ticks[Op.F, microbatch, last]
        scored, summed = ([ticks[op, microbatch, device] for device in range(table.devices)
                           if (op, microbatch, device) in ticks] for op in (Op.S, Op.T))  # fmt: skip
        field["broadcast"][arrived] = field["combine"][max(scored)] = microbatch
        back, done = backward_of(ticks, microbatch, last), max([*scored, *summed])
        lives["hidden"].append((arrived + 1, done if back is None else max(done, back)))
        lives["scores"].append((min(scored), done))
        lives["partial"].append((min(summed, default=done), done))
        if back is not None:
            field["head"][max(scored) if table.algorithm == 2 else done] = microbatch
            field["returned"][backward_of(ticks, microbatch, 0)] = microbatch
    coloured = {name: colour(intervals) for name, intervals in lives.items()}
    return Meetings(
        field,
        {name: np.asarray(chosen, np.int32) for name, (chosen, _) in coloured.items()},
        {name: count for name, (_, count) in coloured.items()},
    )
