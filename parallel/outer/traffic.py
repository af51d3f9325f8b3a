"""Bytes that each replica sends, predicted from the configuration and the shapes of the model. No JAX.

    steps = outer_traffic(outer, shapes, layers=..., replicas=...)
    bytes_sent(steps, 300)     bytes that one replica has sent after update 300
    peak_bytes(steps)          most bytes that it sends after any one update

What a replica contributes to a mean is its coded outer gradient, the payload. In float32 it is reduced: a ring sends
2 (R - 1) / R payloads. In other formats it is gathered: R - 1 payloads. A pair swaps one payload, and with NoLoCo its
anchors too. Islands send whole payloads in every format, R - 1 of them. Data parallelism reduces a float32 gradient
after every update.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import NamedTuple

from ...configs.sections.outer import PAIRWISE_RULES, OuterConfig
from .fragments import Fragment, fragment_offsets, split_fragments
from .wire_sizes import coded_bytes

Shapes = Mapping[str, tuple[int, ...]]  # canonical name -> shape of the array
MeanBytes = Callable[[int, str, int], int]  # (bytes of a payload, wire, replicas) -> bytes sent


class Traffic(NamedTuple):
    """What one replica sends after update `offset + interval`, and after every `interval` updates from there."""

    name: str  # of the outer step
    interval: int
    offset: int
    payload: int  # bytes of its own coded values
    bytes: int  # sent


def outer_traffic(
    outer: OuterConfig, shapes: Shapes, *, layers: int, replicas: int, mean_bytes: MeanBytes | None = None
) -> tuple[Traffic, ...]:
    """The outer steps of `outer` that send anything between `replicas` replicas of a model of such `shapes`.

    `mean_bytes`: bytes that a replica sends for a mean of payloads; default `all_reduce_bytes`, as on a mesh.
    """
    fragments = split_fragments(layers, count=outer.fragments or 1, order=outer.order or "strided")
    offsets = fragment_offsets(len(fragments), interval=outer.every)
    steps = []
    for number, (fragment, offset) in enumerate(zip(fragments, offsets, strict=True)):
        payload = payload_bytes(fragment, shapes, outer.wire)
        size = (
            payload if outer.name in PAIRWISE_RULES else (mean_bytes or all_reduce_bytes)(payload, outer.wire, replicas)
        )
        if outer.name == "noloco":
            size += payload_bytes(fragment, shapes, "float32")
        name = f"send-{number}" if outer.name == "streaming" else "meet"
        steps.append(Traffic(name, outer.every, offset, payload, size))
    return tuple(steps)


def routing_traffic(*, ticks: int, pipe: int, chunks: int, replicas: int, message: int, fields: int) -> Traffic:
    """What one replica sends in every update if microbatches are routed through all replicas.

    A device sends its output, `message` bytes, in each of a table's `ticks`, once for each bit of a replica's number;
    before the first tick also what its chunks read of the batch, `fields` bytes of a replica. Sent by
    `parallel/pipeline/executor/replica_routing.py`.
    """
    payload = ticks * pipe * message + pipe * chunks * fields
    return Traffic("routing", 1, 0, payload, (replicas - 1).bit_length() * payload)


def payload_bytes(fragment: Fragment, shapes: Shapes, wire: str) -> int:
    """Bytes of the arrays in `fragment`, coded."""
    return sum(coded_bytes(wire, shape) for name, shape in shapes.items() if fragment.contains(name))


def all_reduce_bytes(payload: int, wire: str, replicas: int) -> int:
    """Bytes that a replica sends so that all have the mean of their payloads.

    >>> all_reduce_bytes(100, "float32", 4), all_reduce_bytes(100, "e3m0", 4)
    (150, 300)
    """
    return 2 * (replicas - 1) * payload // replicas if wire == "float32" else (replicas - 1) * payload


def all_gather_bytes(payload: int, wire: str, replicas: int) -> int:
    """Bytes that an island sends so that all have all payloads: in float32 too, so that any of them may be missing.

    >>> all_gather_bytes(100, "float32", 4)
    300
    """
    del wire
    return (replicas - 1) * payload


def bytes_sent(steps: Sequence[Traffic], update: int) -> int:
    """Bytes that one replica has sent when update number `update` is done."""
    return sum(max(update - step.offset, 0) // step.interval * step.bytes for step in steps)


def peak_bytes(steps: Sequence[Traffic]) -> int:
    """Most bytes that one replica sends after a single update."""
    by_offset = {}
    for step in steps:
        offset = step.offset % step.interval
        by_offset[offset] = by_offset.get(offset, 0) + step.bytes
    return max(by_offset.values())


def data_parallel_bytes(shapes: Shapes, *, replicas: int) -> int:
    """Bytes that one replica would send after every update if gradients were reduced instead, in float32."""
    return all_reduce_bytes(4 * sum(math.prod(shape) for shape in shapes.values()), "float32", replicas)


def traffic_summary(steps: Sequence[Traffic], shapes: Shapes, *, replicas: int) -> dict[str, object]:
    """The numbers of a plan: bytes of each outer step, of an update on average, the peak, and data parallelism's."""
    # Exact, then rounded once: how sum() rounds floats depends on the version of Python.
    average = float(sum(Fraction(step.bytes, step.interval) for step in steps))
    data_parallel = data_parallel_bytes(shapes, replicas=replicas)
    fields = ("name", "every", "offset", "payload", "bytes")  # the names in plan.json
    return {
        "meetings": [dict(zip(fields, step, strict=True)) for step in steps],
        "bytes_per_update": average,
        "peak_bytes": peak_bytes(steps),
        "data_parallel_bytes_per_update": data_parallel,
        "times_fewer_bytes": data_parallel / average,
    }
