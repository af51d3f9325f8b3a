"""How long a compiled step takes on a target that is not here, by the compiler's own estimates.

    estimate = estimate_step(compiled.as_text(), mesh=mesh, topology=parse_topology("v5p:4x4x4"))
    estimate.seconds, estimate.by_part()["attention"], estimate.by_source()[:10], estimate.unknown

The instructions are walked in the order in which they run. An operation takes the compiler's `estimated_cycles`; a loop
as many rounds as its condition says; of the branches of a conditional the longest counts; a collective takes what its
links need (`parallel/link_time.py`), hidden between its start and its done if other work runs there; a transfer to or
from the host likewise. An operation of which the compiler says nothing takes as long as its bytes need to and from
memory. What cannot be known even so is listed in `unknown`, and is not in the sum.

The sum serves for ratios: a device also waits, which no compiler sees.
"""

import re
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Literal

from jax.sharding import Mesh

from ...configs.hardware_targets import Topology
from ...parallel.hlo.collectives import (
    ARRAY,
    ASYNC_START,
    array_bytes,
    collective_kind,
    device_groups,
    received_bytes,
    varying_axes,
)
from ...parallel.hlo.text import Computation, Instruction, Module, SourceFrame, parse_module
from ...parallel.hlo.trip_counts import Scope, trip_count
from ...parallel.link_time import link_seconds
from .kernel_times import kernel_seconds
from .step_parts import part_of

PRODUCTS = ("dot", "convolution")
COPIES = ("copy", "transpose", "bitcast-convert")
# Operations that move or compute an array by themselves; all others are free, or are part of a fusion.
WORK = (
    *PRODUCTS, *COPIES, "fusion", "custom-call", "dynamic-slice", "dynamic-update-slice", "slice", "pad", "concatenate",
    "broadcast", "reduce", "convert", "gather", "scatter", "sort", "select-and-scatter", "rng-bit-generator", "reshape",
)  # fmt: skip
ALLOCATION = re.compile(r'custom_call_target="(AllocateBuffer|AssumeGatherIndicesInBound|Sharding)"')
ASYNC_DONE = 'custom_call_target="AsyncCollectiveDone"'
HOST_SPACE = re.compile(r"\{[^{}]*S\(5\)[^{}]*\}")
COPY_FUSION = re.compile(r"^(copy|transpose|bitcast_copy|copy_bitcast)[\w.]*fusion")
SMALL = 4096  # bytes, below which an operation without an estimate is free

Basis = Literal["compiler", "kernel table", "memory", "links", "host link"]


@dataclass(frozen=True)
class Cost:
    """Seconds of one instruction in a whole step."""

    part: str  # one of `step_parts.PARTS`
    source: str  # file:line of the Python code
    name: str
    seconds: float
    runs: float
    basis: Basis


@dataclass(frozen=True)
class CollectiveCost:
    """Seconds of one collective, or transfer to the host, in a whole step."""

    kind: str
    axes: tuple[str, ...]
    source: str
    bytes: float  # that a device receives
    runs: float
    link_seconds: float
    exposed_seconds: float  # in which nothing else runs
    synchronous: bool


@dataclass
class StepEstimate:
    """What `estimate_step` has found."""

    seconds: float = 0.0
    costs: list[Cost] = field(default_factory=list)
    collectives: list[CollectiveCost] = field(default_factory=list)
    unknown: Counter[str] = field(default_factory=Counter)  # what has no estimate -> how often it runs

    def by_part(self) -> dict[str, float]:
        """Part -> seconds, the longest first; exposed collectives are a part."""
        parts: Counter[str] = Counter()
        for cost in self.costs:
            parts[cost.part] += cost.seconds
        parts["collectives"] += sum(cost.exposed_seconds for cost in self.collectives)
        return {part: seconds for part, seconds in parts.most_common() if seconds}

    def by_source(self) -> list[tuple[str, float]]:
        """(file:line, seconds) of the code that the operations come from, the longest first."""
        lines: Counter[str] = Counter()
        for cost in self.costs:
            lines[cost.source] += cost.seconds
        return lines.most_common()

    def by_basis(self) -> dict[str, float]:
        """What an estimate rests on -> seconds."""
        found: Counter[str] = Counter()
        for cost in self.costs:
            found[cost.basis] += cost.seconds
        return dict(found)

    def add(self, estimate: "StepEstimate") -> None:
        """Take over the costs of `estimate`."""
        self.costs += estimate.costs
        self.collectives += estimate.collectives
        self.unknown += estimate.unknown


@dataclass(frozen=True)
class Transfer:
    """A collective or a transfer to the host that has started."""

    started: float
    cost: CollectiveCost  # of one run


def estimate_step(text: str, *, mesh: Mesh, topology: Topology, causal: bool = True) -> StepEstimate:
    """Estimate the program whose compiled HLO is `text`, over `mesh`, on `topology`.

    `causal`: no layer has a window, which the text of an attention kernel does not show.
    """
    module = parse_module(text)
    estimate = StepEstimate()
    estimate.seconds = Walker(module, mesh, topology, causal).walk(
        Scope(module, module.computations[module.entry]), 1, estimate
    )
    return estimate


@dataclass(frozen=True)
class Walker:
    """Walks the instructions of a module in their order."""

    module: Module
    mesh: Mesh
    topology: Topology
    causal: bool

    def walk(self, scope: Scope, runs: float, estimate: StepEstimate) -> float:
        """Add the costs of a computation that runs `runs` times to `estimate`; return the seconds of one run."""
        clock = 0.0
        started: dict[str, Transfer] = {}  # instruction that has, or passes on, the state of a transfer -> the transfer
        ended: set[int] = set()
        for instruction in scope.computation.instructions:
            transfer = next((started[name] for name in instruction.operands if name in started), None)
            if instruction.opcode == "while":
                clock += self._loop(scope, instruction, runs, estimate)
            elif instruction.opcode == "conditional":
                clock += self._longest_branch(scope, instruction, runs, estimate)
            elif instruction.opcode == "call":
                clock += self.walk(scope.enter(instruction, instruction.called_computations[0]), runs, estimate)
            elif (cost := self._transfer(instruction, scope.computation, runs, estimate)) is not None:
                if cost.synchronous:
                    clock += cost.link_seconds
                    _record(cost, runs, cost.link_seconds, estimate)
                else:
                    started[instruction.name] = Transfer(clock, cost)
            elif transfer is not None and self._is_end(instruction):
                if id(transfer) not in ended:
                    ended.add(id(transfer))
                    exposed = max(0.0, transfer.started + transfer.cost.link_seconds - clock)
                    clock += exposed
                    _record(transfer.cost, runs, exposed, estimate)
            else:
                if transfer is not None:  # a part of it, or an operation beside which libtpu runs it
                    started[instruction.name] = transfer
                clock += self._operation(instruction, runs, estimate)
        for left in {id(transfer): transfer for transfer in started.values()}.values():
            if id(left) not in ended:  # waited for in another computation
                _record(left.cost, runs, 0.0, estimate)
        return clock

    def _is_end(self, instruction: Instruction) -> bool:
        """Whether a transfer that `instruction` reads the state of is waited for there."""
        return instruction.opcode.endswith("-done") or any(
            ASYNC_DONE in inner.text for inner in self._inner_instructions(instruction)
        )

    def _inner_instructions(self, instruction: Instruction) -> list[Instruction]:
        """The instructions of the computations that `instruction` runs."""
        names = instruction.called_computations if instruction.opcode != "while" else []
        return [inner for name in names for inner in self.module.computations[name].instructions]

    def _loop(self, scope: Scope, loop: Instruction, runs: float, estimate: StepEstimate) -> float:
        rounds = trip_count(scope, loop)
        if rounds is None:
            estimate.unknown[f"rounds of a loop at {source_line(loop.frames)} (counted once)"] += 1
            rounds = 1
        body = scope.enter(loop, loop.attributes["body"].lstrip("%"))
        return rounds * self.walk(body, runs * rounds, estimate)

    def _longest_branch(self, scope: Scope, conditional: Instruction, runs: float, estimate: StepEstimate) -> float:
        longest, seconds = StepEstimate(), -1.0
        for name in conditional.called_computations:
            branch = StepEstimate()
            needed = self.walk(scope.enter(conditional, name), runs, branch)
            if needed > seconds:
                longest, seconds = branch, needed
        estimate.add(longest)
        return max(seconds, 0.0)

    def _transfer(
        self, instruction: Instruction, computation: Computation, runs: float, estimate: StepEstimate
    ) -> CollectiveCost | None:
        """The cost of one run of a collective, or of a transfer to the host, that begins here; None for all else."""
        place = source_line(instruction.frames)
        if (found := self._find_collective(instruction, computation)) is not None:
            collective, inside = found
            kind, groups = collective_kind(collective, inside), list(device_groups(collective.text, self.mesh))
            members, received = max(map(len, groups), default=1), received_bytes(collective, inside, self.mesh)
            axes = varying_axes(collective.text, self.mesh)
            whole = received * members if kind == "reduce-scatter" else received
            devices = list(self.mesh.devices.flat)
            seconds = link_seconds(kind, whole, groups, devices=devices, topology=self.topology)
            if seconds is None:
                what = f"{kind} over {' x '.join(axes)}: the rate of its links is not in the target's file"
                estimate.unknown[what] += int(runs)
            is_start = collective.opcode.endswith("-start") or instruction.opcode.endswith("-start")
            synchronous = not is_start and ASYNC_START not in "".join(
                inner.text for inner in self._inner_instructions(instruction)
            )
            place = source_line(instruction.frames or collective.frames)
            return CollectiveCost(kind, axes, place, received, 1, seconds or 0.0, 0.0, synchronous)
        if instruction.opcode == "copy-start" and HOST_SPACE.search(instruction.type):
            moved = type_bytes(instruction.type) / 2  # the type has source and destination
            bandwidth = self.topology.target.host_bandwidth
            if bandwidth is None:
                estimate.unknown["host transfer: the target's file has no host_bandwidth"] += int(runs)
            seconds = 0.0 if bandwidth is None else moved / bandwidth
            return CollectiveCost("host transfer", (), place, moved, 1, seconds, 0.0, False)
        return None

    def _find_collective(
        self, instruction: Instruction, computation: Computation
    ) -> tuple[Instruction, Computation] | None:
        """The collective that an instruction is, or runs or starts inside of it, and the computation that it is in."""
        if collective_kind(instruction, computation) is not None:
            return instruction, computation
        if instruction.opcode in ("fusion", "async-start", "call-start"):
            for name in instruction.called_computations:
                called = self.module.computations[name]
                for inner in called.instructions:
                    if (found := self._find_collective(inner, called)) is not None:
                        return found
        return None

    def _operation(self, instruction: Instruction, runs: float, estimate: StepEstimate) -> float:
        """Add the cost of an operation that computes or copies; return the seconds of one run."""
        if instruction.opcode not in WORK or ALLOCATION.search(instruction.text):
            return 0.0
        target, basis = self.topology.target, "compiler"
        if "tpu_custom_call" in instruction.text:
            seconds, basis = kernel_seconds(instruction, target, causal=self.causal), "kernel table"
            if seconds is None:
                estimate.unknown[f"kernel {re.sub(r'[.0-9]+$', '', instruction.name)}: not measured"] += int(runs)
                return 0.0
        elif instruction.estimated_cycles is not None and target.clock_hz is not None:
            seconds = instruction.estimated_cycles / target.clock_hz
        else:
            moved = 2 * type_bytes(instruction.type)
            if moved <= SMALL or target.memory_bandwidth is None:
                return 0.0
            seconds, basis = moved / target.memory_bandwidth, "memory"
        part = part_of(
            instruction.frames,
            is_product=self._is_product(instruction),
            is_copy=instruction.opcode in COPIES or COPY_FUSION.match(instruction.name) is not None,
        )
        place = source_line(instruction.frames)
        estimate.costs.append(Cost(part, place, instruction.name, seconds * runs, runs, basis))
        return seconds

    def _is_product(self, instruction: Instruction) -> bool:
        if instruction.opcode in PRODUCTS:
            return True
        called = [self.module.computations[name] for name in instruction.called_computations]
        return any(inner.opcode in PRODUCTS for computation in called for inner in computation.instructions)


def source_line(frames: tuple[SourceFrame, ...]) -> str:
    """`file:line` of the innermost frame in our package, or else of the innermost; "?" without frames."""
    own = next((frame for frame in frames if "/meshwright/" in frame.file), None) or next(iter(frames), None)
    return "?" if own is None else f"{own.file.rpartition('/meshwright/')[2]}:{own.line}"


def type_bytes(text: str) -> int:
    """Bytes of all arrays of an HLO type."""
    return sum(array_bytes(dtype, shape) for dtype, shape in ARRAY.findall(text))


def _record(cost: CollectiveCost, runs: float, exposed: float, estimate: StepEstimate) -> None:
    estimate.collectives.append(
        replace(
            cost,
            runs=runs,
            bytes=cost.bytes * runs,
            link_seconds=cost.link_seconds * runs,
            exposed_seconds=exposed * runs,
        )
    )
