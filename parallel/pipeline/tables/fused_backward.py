"""A backward in one piece: I and the W behind it become B. NumPy only.

One op instead of two needs no stash between them, and the stage before waits for both: 1F1B with a fused backward idles
(p - 1) / (m + p - 1) of the time, split into I and W less. A B takes one tick of the table; the simulator prices it as
I and W together.
"""

from itertools import pairwise

from ....configs.errors import UserError
from .dependencies import Pass
from .list_schedule import orders_of, tabulate
from .table import Op, Table


def fused(table: Table) -> Table:
    """The same orders with B for every I and W. Raises UserError where a W does not directly follow its I."""
    orders = []
    for device, order in enumerate(orders_of(table)):
        for one, behind in pairwise([*order, None]):
            if one.op is Op.I and behind != one._replace(op=Op.W):
                raise UserError(f"schedule {table.name}: device {device} does not do W of microbatch {one.microbatch}, "
                                f"chunk {one.chunk}, directly behind its I, so they cannot be one backward; "
                                f"gpipe, 1f1b and interleaved can be fused")  # fmt: skip
        orders.append([Pass(Op.B, *one[1:]) if one.op is Op.I else one for one in order if one.op is not Op.W])
    return tabulate(orders, table.placement, algorithm=table.algorithm, name=f"{table.name}, fused")
