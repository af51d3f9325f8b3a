"""ZB-H1 and ZB-H2: 1F1B whose weight gradients wait until there is nothing else to do. NumPy only.

    zb-h1   as far ahead as 1F1B, p activations on every device          bubble (p - 1)(F + I - W)
    zb-h2   stage i is 2(p - i) - 1 ahead, 2p - 1 activations            bubble (p - 1)(F + I - 2W)

The second bubble counts each device from its own first pass to its last, as the paper does: it is what remains when no
device waits for the others between steps. Source: Zero Bubble Pipeline Parallelism, arXiv:2401.10241, section 3.
"""

from ..dependencies import Pass
from ..list_schedule import tabulate
from ..placement import straight
from ..table import Op, Table
from ..weight_gradient_fill import filled
from .family import Family, Request
from .one_forward_one_backward import classic


def zb_h1(request: Request) -> Table:
    """[ticks, devices]; peak p microbatches on every device."""
    p = request.devices
    return _delayed(request, ahead=[p - 1 - i for i in range(p)], limit=p, name="zb-h1")


def zb_h2(request: Request) -> Table:
    """[ticks, devices]; peak 2p - 1 microbatches on every device."""
    p = request.devices
    return _delayed(request, ahead=[2 * (p - 1 - i) for i in range(p)], limit=2 * p - 1, name="zb-h2")


def _delayed(request: Request, *, ahead: list[int], limit: int, name: str) -> Table:
    placement = straight(request.devices)
    orders = [without_weights(classic(one, request.microbatches)) for one in ahead]
    orders = filled(orders, placement, limits=[limit] * request.devices)
    return tabulate(orders, placement, algorithm=0, name=name)


def without_weights(order: list[Pass]) -> list[Pass]:
    """The order without its W."""
    return [one for one in order if one.op is not Op.W]


FAMILIES = {
    "zb-h1": Family(zb_h1, "1F1B with weight gradients in the gaps; a third of its bubble, p microbatches"),
    "zb-h2": Family(zb_h2, "further ahead; no bubble between steps, 2p - 1 microbatches"),
}
