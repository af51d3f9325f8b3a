"""Interleaved 1F1B: v stages a device, a microbatch goes around v times. NumPy only.

Microbatches go in groups of p. The bubble is v times smaller, (p - 1) / (v m + p - 1) with a fused backward, for a
peak of p (1 + (p - 1) / (p v)) microbatches and v times the messages. Source: Megatron-LM, arXiv:2104.04473, section
2.2.
"""

from .....configs.errors import UserError
from ..dependencies import Pass
from ..list_schedule import tabulate
from ..placement import interleaved as around
from ..table import Op, Table
from .family import Family, Request


def interleaved(request: Request) -> Table:
    """[ticks, devices]; W directly behind its I. Raises UserError where m is no multiple of p."""
    p, m, v = request.devices, request.microbatches, request.chunks
    if m % p:
        raise UserError(
            f"microbatches: {m}; interleaved sends them around in groups of {p}, one for each stage of the pipeline: "
            f"use {max(m // p, 1) * p} or {(m // p + 1) * p}, or another schedule"
        )
    orders = [_order(min(2 * (p - 1 - i) + (v - 1) * p, m * v), p, m, v) for i in range(p)]
    return tabulate(orders, around(p, chunks=v), algorithm=0, name="interleaved")


def _order(ahead: int, p: int, m: int, v: int) -> list[Pass]:
    turns = [(k // (p * v) * p + k % p, k // p % v) for k in range(m * v)]  # microbatch, how many-th chunk
    forwards = [Pass(Op.F, k, chunk) for k, chunk in turns]
    backwards = [[Pass(op, k, v - 1 - chunk) for op in (Op.I, Op.W)] for k, chunk in turns]
    order = forwards[:ahead]
    for forward, backward in zip(forwards[ahead:], backwards, strict=False):
        order += [forward, *backward]
    return order + [one for backward in backwards[m * v - ahead :] for one in backward]


FAMILIES = {"interleaved": Family(interleaved, "1F1B over v >= 2 stages a device; a v-th of the bubble", (2, None))}
