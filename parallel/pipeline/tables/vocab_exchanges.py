"""The exchanges of vocabulary passes: all devices take part, in ticks that the table alone decides. NumPy only.

Each is for one microbatch at a time, at the end of a tick unless said otherwise:

    embed           start of a tick: every device looks up its rows of the embedding; their sum is the input of stage 0.
                    One tick after stage 0 began the previous microbatch, so that it is ready before F reads it
    broadcast       (C0) the last stage's output goes to all devices, after its F
    combine         (C1) all devices reduce maxima, sums and the targets' logits, after the last S
    head_gradient   the last stage gets its output's gradient: with `combine` (Algorithm 2), or after the last T (C2)
    embed_gradient  stage 0's gradient of its input goes to all devices, which add it to their rows, after its I

The pools of values that wait in between have the same slots on all devices: `hidden` (the broadcast output, read by S,
T and the last stage's I), `scores` (from S to T), `partial` (a device's part of `head_gradient`, Algorithm 1).
Source: Balancing Pipeline Parallelism with Vocabulary Parallelism, arXiv:2411.05288, section 4.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from .interval_coloring import color_intervals
from .op_ticks import Ticks, backward_tick
from .table import Op, Table

KINDS = ("embed", "broadcast", "combine", "head_gradient", "embed_gradient")


@dataclass(frozen=True)
class VocabExchanges:
    """The microbatch of each exchange in each tick, and the pools of what waits in between."""

    microbatch: dict[str, np.ndarray]  # kind -> int32 [ticks], -1: none
    slot: dict[str, np.ndarray]  # pool -> int32 [microbatches]
    slots: dict[str, int]  # pool -> number of slots

    def ticks_of(self, kind: str) -> Iterator[tuple[int, int]]:
        """(microbatch, tick) of every exchange of a kind."""
        return ((int(self.microbatch[kind][tick]), int(tick)) for tick in np.flatnonzero(self.microbatch[kind] >= 0))

    @property
    def fields(self) -> dict[str, np.ndarray]:
        """`exchange_` and kind -> int32 [ticks]; the prefix keeps them apart from the fields of a device."""
        return {f"exchange_{kind}": field for kind, field in self.microbatch.items()}


def schedule_exchanges(table: Table, ticks: Ticks) -> VocabExchanges:
    """The exchanges of a `table` with vocabulary passes, whose ops are at `ticks`."""
    field = {kind: np.full(table.ticks, -1, np.int32) for kind in KINDS}
    last = table.stages - 1
    order = sorted(range(table.microbatches), key=lambda k: ticks[Op.F, k, 0])
    field["embed"][ticks[Op.F, order[0], 0]] = order[0]
    for previous, microbatch in pairwise(order):
        field["embed"][ticks[Op.F, previous, 0] + 1] = microbatch
    lifetimes: dict[str, list[tuple[int, int]]] = {"hidden": [], "scores": [], "partial": []}
    for microbatch in range(table.microbatches):
        forward, backward = ticks[Op.F, microbatch, last], backward_tick(ticks, microbatch, last)
        s_ticks, t_ticks = ([ticks[op, microbatch, device] for device in range(table.devices)
                             if (op, microbatch, device) in ticks] for op in (Op.S, Op.T))  # fmt: skip
        last_s, last_pass = max(s_ticks), max([*s_ticks, *t_ticks])
        field["broadcast"][forward] = field["combine"][last_s] = microbatch
        lifetimes["hidden"].append((forward + 1, last_pass if backward is None else max(last_pass, backward)))
        lifetimes["scores"].append((min(s_ticks), last_pass))
        lifetimes["partial"].append((min(t_ticks, default=last_pass), last_pass))
        if backward is not None:
            field["head_gradient"][last_s if table.algorithm == 2 else last_pass] = microbatch
            field["embed_gradient"][backward_tick(ticks, microbatch, 0)] = microbatch
    colored = {name: color_intervals(intervals) for name, intervals in lifetimes.items()}
    return VocabExchanges(
        field,
        {name: np.asarray(slots, np.int32) for name, (slots, _) in colored.items()},
        {name: count for name, (_, count) in colored.items()},
    )
