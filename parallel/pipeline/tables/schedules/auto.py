"""Zero bubble under a memory limit: how far ahead each stage goes is searched for. NumPy only.

Forwards go ahead until the first backward arrives or the limit is reached; then forward and backward take turns, and
W fill the gaps or make room. How many forwards is best cannot be said beforehand: the limit also cuts W's freedom, so
a small grid is tried, from 1F1B's slope (one more for each stage in front) to ZB-H2's (two more), each with and
without one forward that may delay the first backward. Fewest ticks win, then the shortest span of a device, then the
fewest activations.

Source: Zero Bubble Pipeline Parallelism, arXiv:2401.10241, section 3.1, the heuristic in unit time.
"""

import itertools

import numpy as np

from .....configs.errors import UserError
from ..list_schedule import tabulate
from ..placement import straight
from ..table import Op, Table
from ..weight_gradient_fill import filled
from .family import Family, Request
from .one_forward_one_backward import classic
from .zero_bubble import without_weights

SLOPES = (1.0, 1.25, 1.5, 1.75, 2.0)  # forwards ahead for each stage in front
WINDOWS = (1, 8)  # passes a device chooses among: turns strictly taken, or whichever comes first


def auto(request: Request) -> Table:
    """[ticks, devices]; no device holds more than `memory_limit` microbatches, by default 2p.

    Raises UserError for a limit below one microbatch.
    """
    p = request.devices
    limit = 2 * p if request.memory_limit is None else int(request.memory_limit)
    if limit < 1:
        raise UserError(f"memory_limit: {request.memory_limit} microbatches; a device holds at least 1, and 1f1b {p}")
    slopes = itertools.product(SLOPES, (0, 1))
    ahead = {tuple(min(int(slope * (p - 1 - i)) + more, limit - 1) for i in range(p)) for slope, more in slopes}
    tried = itertools.product(sorted(ahead), WINDOWS)
    return min((_table(request, each, limit, window) for each, window in tried), key=_length)


def _table(request: Request, ahead: tuple[int, ...], limit: int, window: int) -> Table:
    placement = straight(request.devices)
    orders = [without_weights(classic(one, request.microbatches)) for one in ahead]
    orders = filled(orders, placement, limits=[limit] * request.devices, window=window)
    return tabulate(orders, placement, algorithm=0, name="auto")


def _length(table: Table) -> tuple[int, int, int]:
    """Ticks, the longest time from a device's first pass to its last, activations."""
    spans = [int(np.ptp(np.nonzero(column)[0])) for column in (table.op != Op.IDLE).T]
    return table.ticks, max(spans), int(table.slots.sum())


FAMILIES = {"auto": Family(auto, "zero bubble under memory_limit, searched for", options=("memory_limit",))}
