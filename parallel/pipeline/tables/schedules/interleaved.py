"""Interleaved 1F1B: v stages a device, so a microbatch goes around all devices v times. NumPy only.

Microbatches go in groups of p. The bubble is v times smaller, (p - 1) / (v m + p - 1) with a fused backward, at the
price of a peak of p (1 + (p - 1) / (p v)) microbatches and v times the messages. Source: Megatron-LM, arXiv:2104.04473,
section 2.2.
"""

from .....configs.errors import UserError
from ..dependencies import Pass
from ..list_schedule import tabulate
from ..placement import interleaved as interleaved_placement
from ..table import Op, Table
from .family import Family, Request


def interleaved(request: Request) -> Table:
    """[ticks, devices]; W directly after its I. Raises UserError if m is not a multiple of p."""
    p, m, v = request.devices, request.microbatches, request.chunks
    if m % p:
        raise UserError(
            f"microbatches: {m}; pipeline.schedule: interleaved runs them in groups of {p}, one for each device of the "
            f"pipeline: use {max(m // p, 1) * p} or {(m // p + 1) * p}, or another schedule"
        )
    orders = [_order(min(2 * (p - 1 - i) + (v - 1) * p, m * v), p, m, v) for i in range(p)]
    return tabulate(orders, interleaved_placement(p, chunks=v), algorithm=0, name="interleaved")


def _order(warmup: int, p: int, m: int, v: int) -> list[Pass]:
    rounds = [(k // (p * v) * p + k % p, k // p % v) for k in range(m * v)]  # microbatch, number of the round
    forwards = [Pass(Op.F, k, number) for k, number in rounds]
    backwards = [[Pass(op, k, v - 1 - number) for op in (Op.I, Op.W)] for k, number in rounds]
    order = forwards[:warmup]
    for forward, backward in zip(forwards[warmup:], backwards, strict=False):
        order += [forward, *backward]
    return order + [step for backward in backwards[m * v - warmup :] for step in backward]


FAMILIES = {"interleaved": Family(interleaved, "1F1B over v >= 2 stages a device; a v-th of the bubble", (2, None))}
