"""A fused backward: I and the W directly after it become one op B. NumPy only.

One op instead of two needs no stash between them, but the previous stage waits for both: 1F1B with a fused backward
idles (p - 1) / (m + p - 1) of the time, split into I and W less. A B takes one tick of the table; the simulator prices
it as I and W together.
"""

from itertools import pairwise

from ....configs.errors import UserError
from .dependencies import Pass
from .list_schedule import device_orders, tabulate
from .table import Op, Table


def fuse_backward(table: Table) -> Table:
    """The same orders with B for every I and W. Raises UserError where a W does not directly follow its I."""
    orders = []
    for device, order in enumerate(device_orders(table)):
        for step, following in pairwise([*order, None]):
            if step.op is Op.I and following != step._replace(op=Op.W):
                raise UserError(f"pipeline.backward: fused, but device {device} of schedule {table.name} does not do W "
                                f"of microbatch {step.microbatch}, chunk {step.chunk}, directly after its I; "
                                f"use gpipe, 1f1b or interleaved, which can be fused")  # fmt: skip
        orders.append([Pass(Op.B, *step[1:]) if step.op is Op.I else step for step in order if step.op is not Op.W])
    return tabulate(orders, table.placement, algorithm=table.algorithm, name=f"{table.name}, fused")
