"""How much of its time a replica computes, when what it sends has to cross one slow link. NumPy only.

A step of L layers is 4L - 1 nodes: L forward, L - 1 gradients by the input (the first layer needs none), L gradients by
the parameters, and L reductions. Computing nodes run one after another, forward through the layers and back; a
reduction starts when its layer's gradient by the parameters is there and the link is free, and the layer's forward
node `overlap` steps after the next one waits for it. Only the slow link is modelled: nothing else costs or delays.
Every quantity is an array over bandwidths, so that one pass simulates them all.

Source: Streaming DiLoCo, arXiv:2501.18512, section 3.1 and appendix, whose table 4 `published.py` holds.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from .fragments import fragments, offsets

# The paper's bandwidths in Gbit/s: its table holds no others, so neighbouring cells are a factor of 1.207 apart.
BANDWIDTHS = np.logspace(-1, 3, 50)


class Workload(NamedTuple):
    """A replica's work."""

    layers: int
    step_seconds: float  # of computing alone
    gigabits: float  # of all parameters on the wire, in full precision


class Method(NamedTuple):
    """What crosses the link, and when it is needed."""

    sends: Callable[[int, int], np.ndarray]  # (step, layers) -> bool [layers]
    period: int  # steps after which the pattern repeats
    overlap: int = 0  # steps that what was sent may be under way
    shrink: float = 1.0  # bits of a value over those of full precision


def data_parallel() -> Method:
    """Every gradient, every step."""
    return Method(lambda step, layers: np.ones(layers, bool), period=1)


def rarely(every: int, *, overlap: int = 0, shrink: float = 1.0) -> Method:
    """DiLoCo: all parameters, every `every` steps."""
    return Method(lambda step, layers: np.full(layers, step % every == 0), every, overlap, shrink)


def streamed(every: int, *, count: int, order: str = "strided", overlap: int = 0, shrink: float = 1.0) -> Method:
    """Streaming DiLoCo: `count` fragments in turn, the first of which holds no layer."""

    def sends(step: int, layers: int) -> np.ndarray:
        parts = fragments(layers, count=count, order=order)
        turns = offsets(count, every=every)
        due = [layer for part, turn in zip(parts, turns, strict=True) if step % every == turn for layer in part.layers]
        return np.isin(np.arange(layers), due)

    return Method(sends, every, overlap, shrink)


def utilisation(work: Workload, method: Method, bandwidths: np.ndarray = BANDWIDTHS) -> np.ndarray:
    """Share of its time a replica computes at each of `bandwidths` (Gbit/s), in the steady state."""
    node = work.step_seconds / (3 * work.layers - 1)
    reduction = work.gigabits * method.shrink / work.layers / bandwidths
    pattern = [np.flatnonzero(method.sends(step, work.layers)) for step in range(method.period)]
    now, link = np.zeros_like(bandwidths), np.zeros_like(bandwidths)
    arrivals: dict[int, dict[int, np.ndarray]] = {}  # step whose forward pass waits -> layer -> time
    rounds = max(2, 20 // method.period)
    for step in range(2 * rounds * method.period):
        if step == rounds * method.period:
            began = now
        waits = arrivals.pop(step, {})
        reached = 0
        for layer in sorted(waits):
            now = np.maximum(now + (layer - reached) * node, waits[layer])
            reached = layer
        now = now + (work.layers - reached) * node
        sending = arrivals.setdefault(step + 1 + method.overlap, {})
        for layer in pattern[step % method.period][::-1]:
            # Behind the layers above it, whose two nodes are done, and its own two; the first layer has only one.
            done = now + (2 * (work.layers - layer) - (layer == 0)) * node
            link = np.maximum(link, done) + reduction
            sending[int(layer)] = link
        now = now + (2 * work.layers - 1) * node
    return rounds * method.period * work.step_seconds / (now - began)


def needed(work: Workload, method: Method, target: float, bandwidths: np.ndarray = BANDWIDTHS) -> float:
    """The smallest of `bandwidths` at which a replica computes `target` of its time; infinite where none will do."""
    enough = utilisation(work, method, bandwidths) >= target
    return float(bandwidths[enough.argmax()]) if enough.any() else float("inf")
