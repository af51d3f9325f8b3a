"""How many bytes each replica sends, predicted from the configuration and the shapes of the model. No JAX.

    meetings = traffic(outer, shapes, layers=..., replicas=...)
    sent(meetings, 300)        bytes one replica has sent after update 300
    peak(meetings)             most bytes it sends after any one update

What a replica contributes to a mean is its coded drift, the payload. In float32 it is reduced, 2 (R - 1) / R payloads
sent by a ring; in other formats it is gathered, R - 1 payloads. A pair swaps one payload, and NoLoCo its anchors too.
Islands send payloads whole in every format, R - 1 of them. Data parallelism reduces a float32 gradient after every
update.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import NamedTuple

from ...configs.outer import PAIRED, OuterConfig
from .fragments import Fragment, fragments, offsets
from .sizes import coded_bytes

Shapes = Mapping[str, tuple[int, ...]]  # canonical name -> shape of the array


Collected = Callable[[int, str, int], int]  # (bytes of a payload, wire, replicas) -> bytes sent


class Traffic(NamedTuple):
    """What one replica sends after update `offset + every`, and every `every` updates from there."""

    name: str
    every: int
    offset: int
    payload: int  # bytes of its own drift, coded
    bytes: int  # sent


def traffic(
    outer: OuterConfig, shapes: Shapes, *, layers: int, replicas: int, collected: Collected | None = None
) -> tuple[Traffic, ...]:
    """The sending meetings of `outer` between `replicas` replicas of a model of such `shapes`.

    `collected` says what a replica sends for a mean of such payloads; default: as on a mesh.
    """
    parts = fragments(layers, count=outer.fragments or 1, order=outer.order or "strided")
    found = []
    for number, (part, offset) in enumerate(zip(parts, offsets(len(parts), every=outer.every), strict=True)):
        payload = payload_bytes(part, shapes, outer.wire)
        sent = payload if outer.name in PAIRED else (collected or collected_bytes)(payload, outer.wire, replicas)
        if outer.name == "noloco":
            sent += payload_bytes(part, shapes, "float32")
        name = f"send-{number}" if outer.name == "streaming" else "meet"
        found.append(Traffic(name, outer.every, offset, payload, sent))
    return tuple(found)


def routed(*, ticks: int, pipe: int, chunks: int, replicas: int, message: int, fields: int) -> Traffic:
    """What one replica sends in every update because microbatches pass through all (`parallel/pipeline/routing.py`).

    A device sends what it made, `message` bytes, in each of a table's `ticks`, once for each bit of a replica's number;
    and before the first one what its chunks read of the batch, `fields` bytes of a replica.
    """
    payload = ticks * pipe * message + pipe * chunks * fields
    return Traffic("routing", 1, 0, payload, (replicas - 1).bit_length() * payload)


def payload_bytes(part: Fragment, shapes: Shapes, wire: str) -> int:
    """Bytes of the arrays in `part`, coded."""
    return sum(coded_bytes(wire, shape) for name, shape in shapes.items() if part.owns(name))


def collected_bytes(payload: int, wire: str, replicas: int) -> int:
    """Bytes a replica sends so that all know the mean of their payloads.

    >>> collected_bytes(100, "float32", 4), collected_bytes(100, "e3m0", 4)
    (150, 300)
    """
    return 2 * (replicas - 1) * payload // replicas if wire == "float32" else (replicas - 1) * payload


def gathered_bytes(payload: int, wire: str, replicas: int) -> int:
    """Bytes an island sends so that all know all payloads, whole: in float32 too, so that any of them may be missing.

    >>> gathered_bytes(100, "float32", 4)
    300
    """
    del wire
    return (replicas - 1) * payload


def sent(meetings: Sequence[Traffic], update: int) -> int:
    """Bytes one replica has sent when update number `update` is done."""
    return sum(max(update - one.offset, 0) // one.every * one.bytes for one in meetings)


def peak(meetings: Sequence[Traffic]) -> int:
    """Most bytes one replica sends after a single update."""
    at = {}
    for one in meetings:
        at[one.offset % one.every] = at.get(one.offset % one.every, 0) + one.bytes
    return max(at.values())


def data_parallel(shapes: Shapes, *, replicas: int) -> int:
    """Bytes one replica would send after every update if gradients were reduced instead, in float32."""
    return collected_bytes(4 * sum(math.prod(shape) for shape in shapes.values()), "float32", replicas)


def summary(meetings: Sequence[Traffic], shapes: Shapes, *, replicas: int) -> dict[str, object]:
    """The numbers of a plan: bytes of each meeting and of an update on average, the peak, and data parallelism's."""
    # Exact, then rounded once: how sum() rounds floats depends on the version of Python.
    average = float(sum(Fraction(one.bytes, one.every) for one in meetings))
    reduced = data_parallel(shapes, replicas=replicas)
    return {
        "meetings": [one._asdict() for one in meetings],
        "bytes_per_update": average,
        "peak_bytes": peak(meetings),
        "data_parallel_bytes_per_update": reduced,
        "times_fewer_bytes": reduced / average,
    }
