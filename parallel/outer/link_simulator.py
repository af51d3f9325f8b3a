"""Simulation of the share of its time that a replica computes, if what it sends crosses one slow link. NumPy only.

A step of L layers is 4L - 1 nodes: L forward, L - 1 gradients by the input (the first layer needs none), L gradients by
the parameters, and L reductions. Computing nodes run one after another, forward through the layers and back. A
reduction starts when its layer's gradient by the parameters is done and the link is free; the layer's forward node,
`overlap` steps after the next one, waits for it. Only the slow link is modelled: nothing else costs or delays.
Every quantity is an array over bandwidths, so that one pass simulates them all.

Source: Streaming DiLoCo, arXiv:2501.18512, section 3.1 and appendix; its table 4 is in `reference_tables.py`.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from .fragments import fragment_offsets, split_fragments

# The paper's bandwidths in Gbit/s: its table has no others, so neighbouring cells are a factor of 1.207 apart.
BANDWIDTHS = np.logspace(-1, 3, 50)


class Workload(NamedTuple):
    """A replica's model and speed."""

    layers: int
    step_seconds: float  # of computing alone
    gigabits: float  # of all parameters on the wire, in full precision


class Method(NamedTuple):
    """What crosses the link, and when it is needed."""

    sends: Callable[[int, int], np.ndarray]  # (step, layers) -> bool [layers]
    period: int  # steps after which the pattern repeats
    overlap: int = 0  # steps that a message may take
    compression: float = 1.0  # bits of a value over those of full precision


def data_parallel() -> Method:
    """Every gradient, every step."""
    return Method(lambda step, layers: np.ones(layers, bool), period=1)


def diloco(interval: int, *, overlap: int = 0, compression: float = 1.0) -> Method:
    """All parameters, every `interval` steps."""
    return Method(lambda step, layers: np.full(layers, step % interval == 0), interval, overlap, compression)


def streaming_diloco(
    interval: int, *, count: int, order: str = "strided", overlap: int = 0, compression: float = 1.0
) -> Method:
    """`count` fragments in turn, the first of which has no layer."""

    def sends(step: int, layers: int) -> np.ndarray:
        fragments = split_fragments(layers, count=count, order=order)
        offsets = fragment_offsets(count, interval=interval)
        due = [layer for fragment, offset in zip(fragments, offsets, strict=True) if step % interval == offset
               for layer in fragment.layers]  # fmt: skip
        return np.isin(np.arange(layers), due)

    return Method(sends, interval, overlap, compression)


def utilisation(work: Workload, method: Method, bandwidths: np.ndarray = BANDWIDTHS) -> np.ndarray:
    """Share of its time that a replica computes at each of `bandwidths` (Gbit/s), in the steady state."""
    node = work.step_seconds / (3 * work.layers - 1)
    reduction = work.gigabits * method.compression / work.layers / bandwidths
    pattern = [np.flatnonzero(method.sends(step, work.layers)) for step in range(method.period)]
    now, link_free = np.zeros_like(bandwidths), np.zeros_like(bandwidths)
    arrivals: dict[int, dict[int, np.ndarray]] = {}  # step whose forward pass waits -> layer -> time
    rounds = max(2, 20 // method.period)
    for step in range(2 * rounds * method.period):
        if step == rounds * method.period:
            start = now
        waits = arrivals.pop(step, {})
        layers_done = 0
        for layer in sorted(waits):
            now = np.maximum(now + (layer - layers_done) * node, waits[layer])
            layers_done = layer
        now = now + (work.layers - layers_done) * node
        sending = arrivals.setdefault(step + 1 + method.overlap, {})
        for layer in pattern[step % method.period][::-1]:
            # After the two nodes of each layer above, and its own two; the first layer has only one.
            gradient_done = now + (2 * (work.layers - layer) - (layer == 0)) * node
            link_free = np.maximum(link_free, gradient_done) + reduction
            sending[int(layer)] = link_free
        now = now + (2 * work.layers - 1) * node
    return rounds * method.period * work.step_seconds / (now - start)


def required_bandwidth(work: Workload, method: Method, target: float, bandwidths: np.ndarray = BANDWIDTHS) -> float:
    """The smallest of `bandwidths` at which a replica computes `target` of its time; infinite if none is enough."""
    enough = utilisation(work, method, bandwidths) >= target
    return float(bandwidths[enough.argmax()]) if enough.any() else float("inf")
