"""The one reader of compiled HLO: which collectives a program runs, over which mesh axes, how often, of what size.

    compiled = jax.jit(f).lower(x).compile()
    for c in collectives(compiled.as_text(), mesh): print(c.kind, c.axes, c.bytes, c.count, c.under_conditional)

`bytes` is what one device holds of the result (all-gather: the gathered array; reduce-scatter: its share); `count` is
how often the instruction runs, loops with a known trip count multiplied through.
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
PART = re.compile(r"'([^']+)'(?::\((\d+)\)(\d+))?")
TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


@dataclass(frozen=True)
class Instruction:
    """One line of HLO."""

    name: str
    opcode: str
    type: str
    text: str

    @property
    def called(self) -> list[str]:
        """Computations this instruction runs."""
        branches = BRANCHES.search(self.text)
        names = [name.strip().lstrip("%") for name in branches[1].split(",")] if branches else []
        return names + CALLED.findall(self.text)


@dataclass(frozen=True)
class Collective:
    """One communication of the program."""

    kind: str
    name: str
    axes: tuple[str, ...]  # mesh axes whose coordinate differs inside a group, in mesh order
    bytes: int  # of the result, on one device, each time
    count: int  # times it runs
    under_conditional: bool  # inside a branch or a loop of unknown length, which some devices may skip
    source: str  # the op_name of the JAX code it comes from


def collectives(text: str, mesh: Mesh) -> list[Collective]:
    """Every collective in the compiled module `text` of a program over `mesh`, in the order of the text."""
    computations = parse(text)
    runs = multiplicities(text, computations)
    found = []
    for computation, instructions in computations.items():
        for instruction in instructions:
            kind = instruction.opcode.removesuffix("-start")
            if kind not in KINDS or computation not in runs:
                continue
            count, conditional = runs[computation]
            source = re.search(r'op_name="([^"]*)"', instruction.text)
            found.append(
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
    return found


def refuse_permute_under_conditional(text: str, mesh: Mesh) -> None:
    """Raise MeshwrightError if the module `text` permutes devices inside a branch, naming the first such op.

    Devices of a pipeline take different branches of one conditional, or skip a loop. There a collective-permute, which
    all devices of the program have to join, waits for ever; others wait for the members of their own group only.
    """
    for one in collectives(text, mesh):
        if one.kind == "collective-permute" and one.under_conditional:
            raise MeshwrightError(
                f"collective-permute {one.name} over {' x '.join(one.axes)} is inside a conditional, where it would "
                f"never end ({one.bytes} bytes, from {one.source or 'no known source'}); move it out of the branch, or "
                "keep the dimension it moves unsharded (a mesh axis of size 1)"
            )


def parse(text: str) -> dict[str, list[Instruction]]:
    """Computation name -> its instructions."""
    computations: dict[str, list[Instruction]] = {}
    current: list[Instruction] = []
    for line in text.splitlines():
        if header := HEADER.match(line):
            current = computations.setdefault(header["name"], [])
        elif match := INSTRUCTION.match(line):
            current.append(Instruction(match["name"], match["opcode"], match["type"], line))
    return computations


def multiplicities(text: str, computations: Mapping[str, list[Instruction]]) -> dict[str, tuple[int, bool]]:
    """Computation -> (times it runs, whether under a branch or a loop of unknown length), if the entry reaches it."""
    entry = re.search(r"^ENTRY %?([\w.\-]+) ", text, re.MULTILINE)
    if entry is None:
        raise ValueError(f"no ENTRY computation in {len(text)} characters of HLO; pass compiled.as_text()")
    runs: dict[str, tuple[int, bool]] = {}

    def visit(name: str, count: int, conditional: bool) -> None:
        before, was_conditional = runs.get(name, (0, False))
        runs[name] = (before + count, conditional or was_conditional)
        for instruction in computations.get(name, ()):
            trips = TRIPS.search(instruction.text) if instruction.opcode == "while" else None
            # A loop whose rounds are not known when it is compiled may be one that some devices skip.
            free = instruction.opcode == "conditional" or (instruction.opcode == "while" and trips is None)
            for called in instruction.called:
                visit(called, count * (int(trips[1]) if trips else 1), conditional or free)

    visit(entry[1], 1, False)
    return runs


def result_bytes(instruction: Instruction) -> int:
    """Bytes of the instruction's result. Most asynchronous starts give (operands, results, counters): results count."""
    arrays = ARRAY.findall(instruction.type)
    if instruction.opcode.endswith("-start") and instruction.opcode != "all-reduce-start":
        arrays = [(dtype, shape) for dtype, shape in arrays if (dtype, shape) != ("u32", "")]
        arrays = arrays[len(arrays) // 2 :]
    return sum(array_bytes(dtype, shape) for dtype, shape in arrays)


def array_bytes(dtype: str, shape: str) -> int:
    """Bytes of an array, from its HLO type: `array_bytes("bf16", "8,16")` is 256."""
    bits = 8 if dtype == "pred" else int(re.search(r"\d+", dtype)[0])
    return math.ceil(bits / 8 * math.prod(int(size) for size in shape.split(",") if size))


def varying_axes(text: str, mesh: Mesh) -> tuple[str, ...]:
    """The mesh axes along which members of a group of the collective in `text` differ."""
    grid = np.arange(mesh.devices.size).reshape(mesh.devices.shape)
    place = {int(device): np.array(where) for where, device in np.ndenumerate(grid)}
    differs = np.zeros(grid.ndim, bool)
    for group in groups(text, mesh):
        coordinates = np.array([place[device] for device in group])
        differs |= (coordinates != coordinates[0]).any(axis=0)
    return tuple(axis for axis, varies in zip(mesh.axis_names, differs, strict=True) if varies)


def groups(text: str, mesh: Mesh) -> Iterator[list[int]]:
    """Device groups of a collective: written as pairs, a list, an iota, or axes of a mesh."""
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
        raise ValueError(f"replica_groups in a form this reader does not know: {text.strip()[:200]}")
    else:
        yield list(range(mesh.devices.size))


def mesh_groups(sizes: str, dims: str | None, order: str | None, along: str) -> list[list[int]]:
    """Groups written as axes of a mesh of their own, whose device order may be transposed, and parts of such axes.

    `mesh['a'=4,'b'=2], device_ids=([2,2,2]T(0,2,1)) {'a':(2)2}`: the minor half of axis a.
    """
    shape = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", sizes)}
    devices = np.arange(math.prod(shape.values()))
    if dims is not None:
        devices = devices.reshape([int(n) for n in dims.split(",")])
        devices = devices.transpose([int(n) for n in order.split(",")] if order else None)
    split, inner = [], []
    parts = {name: (int(before or 1), int(size or shape[name])) for name, before, size in PART.findall(along)}
    for name, size in shape.items():
        if name in parts:
            before, part = parts[name]
            inner.append(len(split) + 1)
            split += [before, part, size // (before * part)]
        else:
            split.append(size)
    outer = [number for number in range(len(split)) if number not in inner]
    grid = devices.reshape(split).transpose(outer + inner)
    return grid.reshape(-1, math.prod(split[number] for number in inner)).tolist()


def bytes_by_axes(found: list[Collective]) -> dict[str, dict[str, int]]:
    """kind -> mesh axes joined by `+` -> bytes a device receives per run of the program."""
    table: dict[str, dict[str, int]] = {}
    for one in found:
        row = table.setdefault(one.kind, {})
        key = "+".join(one.axes) or "none"
        row[key] = row.get(key, 0) + one.bytes * one.count
    return table
