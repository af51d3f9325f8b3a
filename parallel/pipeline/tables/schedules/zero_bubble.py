"""ZB-H1 and ZB-H2: 1F1B whose weight gradients are delayed until a device would be idle. NumPy only.

    zb-h1   warm-up of 1F1B, p activations on every device                    bubble (p - 1)(F + I - W)
    zb-h2   stage i starts with 2(p - i) - 1 forwards, 2p - 1 activations     bubble (p - 1)(F + I - 2W)

The second bubble counts each device from its own first pass to its last, as the paper does: it is what remains when no
device waits for the others between steps. Source: Zero Bubble Pipeline Parallelism, arXiv:2401.10241, section 3.
"""

from collections.abc import Sequence

from ..list_schedule import tabulate
from ..placement import straight
from ..table import Op, Table
from ..weight_gradient_fill import fill_weight_gradients
from .family import Family, Request
from .one_forward_one_backward import classic_order


def zb_h1(request: Request) -> Table:
    """[ticks, devices]; peak p microbatches on every device."""
    p = request.devices
    return delayed_weight_gradients(request, warmup=[p - 1 - i for i in range(p)], limit=p, name="zb-h1")


def zb_h2(request: Request) -> Table:
    """[ticks, devices]; peak 2p - 1 microbatches on every device."""
    p = request.devices
    return delayed_weight_gradients(request, warmup=[2 * (p - 1 - i) for i in range(p)], limit=2 * p - 1, name="zb-h2")


def delayed_weight_gradients(
    request: Request, *, warmup: Sequence[int], limit: int, name: str, window: int = 1
) -> Table:
    """1F1B with `warmup[i]` forwards first on stage i, and W in the gaps; at most `limit` activations on a device.

    `window`: passes that a device chooses among (`fill_weight_gradients`).
    """
    placement = straight(request.devices)
    orders = [[step for step in classic_order(count, request.microbatches) if step.op is not Op.W] for count in warmup]
    orders = fill_weight_gradients(orders, placement, limits=[limit] * request.devices, window=window)
    return tabulate(orders, placement, algorithm=0, name=name)


FAMILIES = {
    "zb-h1": Family(zb_h1, "1F1B with weight gradients in the gaps; a third of its bubble, p microbatches"),
    "zb-h2": Family(zb_h2, "further ahead; no bubble between steps, 2p - 1 microbatches"),
}
