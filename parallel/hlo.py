"""The one reader of compiled HLO: the collectives of a program, with mesh axes, number of runs and size.

    compiled = jax.jit(f).lower(x).compile()
    for c in collectives(compiled.as_text(), mesh): print(c.kind, c.axes, c.bytes, c.count, c.under_conditional)

`bytes` is the size of the result on one device (all-gather: the gathered array; reduce-scatter: its shard). `count` is
how often the instruction runs: the trip counts of its loops multiplied.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from jax.sharding import Mesh

from ..configs.errors import MeshwrightError

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
HEADER = re.compile(r"^(?:ENTRY )?%?(?P<name>[\w.\-]+) \(.*\{$")
INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?(?P<name>[\w.\-]+) = (?P<type>.*?) (?P<opcode>[a-z][\w\-]*)\((?P<rest>.*)$")
ARRAY = re.compile(r"\b(pred|[sufc]\d+|bf16|f\d+e\d+m\d+\w*)\[([\d,]*)\]")
CALLED = re.compile(r"(?:body|condition|to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)")
BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
MESH_GROUPS = re.compile(
    r"replica_groups=mesh\[(?P<sizes>[^\]]*)\](?:, device_ids=\(\[(?P<dims>[\d,]+)\](?:T\((?P<order>[\d,]+)\))?\))?"
    r"\s*\{(?P<along>[^}]*)\}"
)
AXIS_PART = re.compile(r"'([^']+)'(?::\((\d+)\)(\d+))?")
TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


@dataclass(frozen=True)
class Instruction:
    """One line of HLO."""

    name: str
    opcode: str
    type: str
    text: str

    @property
    def called_computations(self) -> list[str]:
        """Names of the computations that this instruction runs."""
        branches = BRANCHES.search(self.text)
        names = [name.strip().lstrip("%") for name in branches[1].split(",")] if branches else []
        return names + CALLED.findall(self.text)


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
    computations = parse_computations(text)
    runs = count_runs(text, computations)
    operations = []
    for computation, instructions in computations.items():
        for instruction in instructions:
            kind = instruction.opcode.removesuffix("-start")
            if kind not in KINDS or computation not in runs:
                continue
            count, conditional = runs[computation]
            source = re.search(r'op_name="([^"]*)"', instruction.text)
            operations.append(
                Collective(
                    kind=kind,
                    name=instruction.name,
                    axes=varying_axes(instruction.text, mesh),
                    bytes=result_bytes(instruction),
                    count=count,
                    under_conditional=conditional,
                    source=source[1] if source else "",
                )
            )
    return operations


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


def parse_computations(text: str) -> dict[str, list[Instruction]]:
    """Computation name -> its instructions."""
    computations: dict[str, list[Instruction]] = {}
    current: list[Instruction] = []
    for line in text.splitlines():
        if header := HEADER.match(line):
            current = computations.setdefault(header["name"], [])
        elif match := INSTRUCTION.match(line):
            current.append(Instruction(match["name"], match["opcode"], match["type"], line))
    return computations


def count_runs(text: str, computations: Mapping[str, list[Instruction]]) -> dict[str, tuple[int, bool]]:
    """Computation -> (number of runs, whether under a branch or a loop of unknown length), if the entry reaches it."""
    entry = re.search(r"^ENTRY %?([\w.\-]+) ", text, re.MULTILINE)
    if entry is None:
        raise ValueError(f"no ENTRY computation in {len(text)} characters of HLO; pass compiled.as_text()")
    runs: dict[str, tuple[int, bool]] = {}

    def visit(name: str, count: int, conditional: bool) -> None:
        earlier_count, was_conditional = runs.get(name, (0, False))
        runs[name] = (earlier_count + count, conditional or was_conditional)
        for instruction in computations.get(name, ()):
            trips = TRIP_COUNT.search(instruction.text) if instruction.opcode == "while" else None
            # A loop whose trip count is unknown at compile time may be one that some devices skip.
            may_skip = instruction.opcode == "conditional" or (instruction.opcode == "while" and trips is None)
            for called in instruction.called_computations:
                visit(called, count * (int(trips[1]) if trips else 1), conditional or may_skip)

    visit(entry[1], 1, False)
    return runs


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
