"""Zero bubble under a memory limit, with a search for the number of warm-up forwards of each stage. NumPy only.

A stage does forwards until the first backward arrives or the limit is reached (the warm-up); then forward and backward
alternate, and W fills the gaps or frees memory. The best warm-up has no formula, as the limit also restricts where W
may go, so a small grid is tried: from 1F1B's slope (one more forward for each later stage) to ZB-H2's (two more), each
with and without one forward that may delay the first backward. Fewest ticks win, then the shortest span of a device,
then the fewest activations.

Source: Zero Bubble Pipeline Parallelism, arXiv:2401.10241, section 3.1, the heuristic in unit time.
"""

import itertools

import numpy as np

from .....configs.errors import UserError
from ..table import Op, Table
from .family import Family, Request
from .zero_bubble import delayed_weight_gradients

SLOPES = (1.0, 1.25, 1.5, 1.75, 2.0)  # warm-up forwards for each later stage
WINDOWS = (1, 8)  # passes a device chooses among; 1: it strictly alternates


def auto(request: Request) -> Table:
    """[ticks, devices]; no device holds more than `memory_limit` microbatches, by default 2p.

    Raises UserError for a limit below one microbatch.
    """
    p = request.devices
    limit = 2 * p if request.memory_limit is None else int(request.memory_limit)
    if limit < 1:
        raise UserError(
            f"memory_limit: {request.memory_limit} microbatches, but a device holds at least 1; 1f1b holds {p}"
        )
    grid = itertools.product(SLOPES, (0, 1))
    warmups = {tuple(min(int(slope * (p - 1 - i)) + more, limit - 1) for i in range(p)) for slope, more in grid}
    tables = (
        delayed_weight_gradients(request, warmup=warmup, limit=limit, window=window, name="auto")
        for warmup, window in itertools.product(sorted(warmups), WINDOWS)
    )
    return min(tables, key=_length)


def _length(table: Table) -> tuple[int, int, int]:
    """Ticks, the longest span from a device's first pass to its last, activations of all devices."""
    spans = [int(np.ptp(np.nonzero(column)[0])) for column in (table.op != Op.IDLE).T]
    return table.ticks, max(spans), int(table.slots.sum())


FAMILIES = {"auto": Family(auto, "zero bubble under memory_limit, searched for", options=("memory_limit",))}
