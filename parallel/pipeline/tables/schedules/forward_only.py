"""Forward only, for evaluation. Any placement; with vocabulary passes an S follows the last forward. NumPy only."""

from ..dependencies import Pass
from ..list_schedule import tabulate
from ..placement import straight
from ..table import Op, Table
from .family import Family, Request


def forward_only(request: Request) -> Table:
    """[ticks, devices] of F and S, for `placement`, by default straight.

    Microbatches enter as many ticks apart as a device has passes for each, so no microbatch waits on its way.
    """
    placement = straight(request.devices) if request.placement is None else request.placement
    interval = placement.shape[1] + bool(request.vocabulary)
    orders = []
    for stages in placement.tolist():
        timed = [
            (stage + microbatch * interval, Pass(Op.F, microbatch, chunk))
            for chunk, stage in enumerate(stages)
            for microbatch in range(request.microbatches)
        ]
        if request.vocabulary:
            timed += [(placement.size + k * interval, Pass(Op.S, k, -1)) for k in range(request.microbatches)]
        orders.append([step for _, step in sorted(timed)])
    return tabulate(orders, placement, algorithm=request.vocabulary, name="forward-only")


FAMILIES = {
    "forward-only": Family(
        forward_only, "evaluation: no backwards", vocabulary=(0, 1, 2), options=("placement",), trains=False
    )
}
