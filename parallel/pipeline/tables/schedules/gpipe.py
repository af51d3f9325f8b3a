"""GPipe: all forwards, then all backwards. NumPy only.

A device holds the activations of every microbatch. The idle share with a fused backward is (p - 1) / (m + p - 1).
Source: GPipe, arXiv:1811.06965.
"""

from ..dependencies import Pass
from ..list_schedule import tabulate
from ..placement import straight
from ..table import Op, Table
from .family import Family, Request


def gpipe(request: Request) -> Table:
    """[ticks, devices]; peak m microbatches on every device."""
    microbatches = range(request.microbatches)
    order = [Pass(Op.F, k, 0) for k in microbatches]
    order += [Pass(op, k, 0) for k in microbatches for op in (Op.I, Op.W)]
    return tabulate([order] * request.devices, straight(request.devices), algorithm=0, name="gpipe")


FAMILIES = {"gpipe": Family(gpipe, "all forwards, then all backwards; holds every microbatch")}
