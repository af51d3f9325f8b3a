"""The collectives of a compiled program, with mesh axes, number of runs and size.

    compiled = jax.jit(f).lower(x).compile()
    for c in collectives(compiled.as_text(), mesh): print(c.kind, c.axes, c.bytes, c.count, c.under_conditional)

`bytes` is the size of the result on one device (all-gather: the gathered array; reduce-scatter: its shard). `count` is
how often the instruction runs: the trip counts of its loops multiplied. A collective that the compiler splits into a
start, parts and a done counts once.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jax.sharding import Mesh

from ...configs.errors import MeshwrightError
from .text import Computation, Instruction, parse_module
from .trip_counts import count_runs

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
ARRAY = re.compile(r"\b(pred|[sufc]\d+|bf16|f\d+e\d+m\d+\w*)\[([\d,]*)\]")
MESH_GROUPS = re.compile(
    r"replica_groups=mesh\[(?P<sizes>[^\]]*)\](?:, device_ids=\(\[(?P<dims>[\d,]+)\](?:T\((?P<order>[\d,]+)\))?\))?"
    r"\s*\{(?P<along>[^}]*)\}"
)
PART_OF_ASYNC = '"async_collective_fusion_config"'
ASYNC_START = 'custom_call_target="AsyncCollectiveStart"'
AXIS_PART = re.compile(r"'([^']+)'(?::\((\d+)\)(\d+))?")


@dataclass(frozen=True)
class Collective:
    """One communication of the program."""

    kind: str  # one of KINDS
    name: str
    axes: tuple[str, ...]  # mesh axes whose coordinate differs inside a group, in mesh order
    bytes: int  # of the result, on one device, each time
    count: int  # number of runs
    under_conditional: bool  # inside a branch or a loop of unknown length, which some devices may skip
    source: str  # op_name of the JAX code


def collectives(text: str, mesh: Mesh) -> list[Collective]:
    """Every collective in the compiled module `text` of a program over `mesh`, in the order of the text."""
    module = parse_module(text)
    runs = count_runs(module)
    return [
        Collective(
            kind=collective_kind(instruction, computation),
            name=instruction.name,
            axes=varying_axes(instruction.text, mesh),
            bytes=received_bytes(instruction, computation, mesh),
            count=runs[name].count,
            under_conditional=runs[name].under_conditional,
            source=instruction.op_name,
        )
        for name, computation in module.computations.items()
        if name in runs
        for instruction in computation.instructions
        if collective_kind(instruction, computation) is not None
    ]


def collective_kind(instruction: Instruction, computation: Computation) -> str | None:
    """Return which of KINDS an `instruction` of `computation` is; None for all else, the end of a collective included.

    libtpu spreads a collective over fusions, and repeats its instruction in each: the one beside AsyncCollectiveStart
    counts. It keeps a reduce-scatter as an all-reduce and a slice in one fusion.
    """
    kind = instruction.opcode.removesuffix("-start")
    if kind not in KINDS:
        return None
    if PART_OF_ASYNC in instruction.text and not any(ASYNC_START in one.text for one in computation.instructions):
        return None
    return "reduce-scatter" if _is_reduce_scatter(instruction, computation) else kind


def _is_reduce_scatter(instruction: Instruction, computation: Computation) -> bool:
    return instruction.opcode == "all-reduce" and computation.name.startswith("all-reduce-scatter")


def received_bytes(instruction: Instruction, computation: Computation, mesh: Mesh) -> int:
    """Bytes of the result of a collective, on one device."""
    size = result_bytes(instruction)
    if _is_reduce_scatter(instruction, computation):
        return size // len(next(iter(device_groups(instruction.text, mesh))))
    return size


def refuse_permute_under_conditional(text: str, mesh: Mesh) -> None:
    """Raise MeshwrightError if the module `text` has a collective-permute inside a branch, naming the first one.

    Devices of a pipeline take different branches of one conditional, or skip a loop. A collective-permute there never
    ends, because all devices of the program must join it; other collectives wait only for their own group.
    """
    for op in collectives(text, mesh):
        if op.kind == "collective-permute" and op.under_conditional:
            raise MeshwrightError(
                f"collective-permute {op.name} over {' x '.join(op.axes)} is inside a conditional, where it would "
                f"never end ({op.bytes} bytes, from {op.source or 'an unknown source'}); move it out of the branch, or "
                "do not shard the dimension that it moves (a mesh axis of size 1)"
            )


def result_bytes(instruction: Instruction) -> int:
    """Bytes of the instruction's result. Most asynchronous starts return (operands, results, counters)."""
    arrays = ARRAY.findall(instruction.type)
    if instruction.opcode.endswith("-start") and instruction.opcode != "all-reduce-start":
        arrays = [(dtype, shape) for dtype, shape in arrays if (dtype, shape) != ("u32", "")]
        arrays = arrays[len(arrays) // 2 :]
    return sum(array_bytes(dtype, shape) for dtype, shape in arrays)


def array_bytes(dtype: str, shape: str) -> int:
    """Bytes of an array from its HLO type.

    >>> array_bytes("bf16", "8,16")
    256
    """
    bits = 8 if dtype == "pred" else int(re.search(r"\d+", dtype)[0])
    return math.ceil(bits / 8 * math.prod(int(size) for size in shape.split(",") if size))


def varying_axes(text: str, mesh: Mesh) -> tuple[str, ...]:
    """The mesh axes along which members of a group of the collective in `text` differ."""
    varies = np.zeros(mesh.devices.ndim, bool)
    for group in device_groups(text, mesh):
        coordinates = np.array(np.unravel_index(group, mesh.devices.shape))  # [axis, member]
        varies |= (coordinates != coordinates[:, :1]).any(axis=1)
    return tuple(axis for axis, differs in zip(mesh.axis_names, varies, strict=True) if differs)


def device_groups(text: str, mesh: Mesh) -> Iterator[list[int]]:
    """Device groups of a collective, written as pairs, a list, an iota, or axes of a mesh."""
    if pairs := re.search(r"source_target_pairs=\{(.*?)\}\}", text):
        yield from ([int(n) for n in pair.split(",")] for pair in re.findall(r"\{(\d+,\d+)", pairs[1] + "}"))
    elif iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        shape, dims, order = ([int(n) for n in part.split(",")] if part else None for part in iota.groups())
        devices = np.arange(math.prod(dims)).reshape(dims)
        yield from (devices.transpose(order) if order else devices).reshape(shape).reshape(-1, shape[-1]).tolist()
    elif listed := re.search(r"replica_groups=\{(.*?)\}(?:\}|,|$)", text):
        members = [[int(n) for n in group.split(",")] for group in re.findall(r"\{?(\d+(?:,\d+)*)\}?", listed[1])]
        yield from members or [list(range(mesh.devices.size))]
    elif named := MESH_GROUPS.search(text):
        yield from mesh_groups(**named.groupdict())
    elif "replica_groups=" in text:
        raise ValueError(f"replica_groups in a form that this reader does not know: {text.strip()[:200]}")
    else:
        yield list(range(mesh.devices.size))


def mesh_groups(sizes: str, dims: str | None, order: str | None, along: str) -> list[list[int]]:
    """Groups written as axes, or parts of axes, of a mesh in the text, whose device order may be transposed.

    `mesh['a'=4,'b'=2], device_ids=([2,2,2]T(0,2,1)) {'a':(2)2}`: the minor half of axis a.
    """
    shape = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", sizes)}
    devices = np.arange(math.prod(shape.values()))
    if dims is not None:
        devices = devices.reshape([int(n) for n in dims.split(",")])
        devices = devices.transpose([int(n) for n in order.split(",")] if order else None)
    split, inner = [], []
    parts = {name: (int(major or 1), int(size or shape[name])) for name, major, size in AXIS_PART.findall(along)}
    for name, size in shape.items():
        if name in parts:
            major, part = parts[name]
            inner.append(len(split) + 1)
            split += [major, part, size // (major * part)]
        else:
            split.append(size)
    outer = [number for number in range(len(split)) if number not in inner]
    grid = devices.reshape(split).transpose(outer + inner)
    return grid.reshape(-1, math.prod(split[number] for number in inner)).tolist()


def bytes_by_axes(operations: list[Collective]) -> dict[str, dict[str, int]]:
    """kind -> mesh axes joined by `+` -> bytes that a device receives in one run of the program."""
    table: dict[str, dict[str, int]] = {}
    for op in operations:
        row = table.setdefault(op.kind, {})
        key = "+".join(op.axes) or "none"
        row[key] = row.get(key, 0) + op.bytes * op.count
    return table
