"""Compiled HLO as text: its computations, their instructions, and the Python source of each instruction.

    module = parse_module(compiled.as_text())
    for instruction in module.computations[module.entry].instructions: print(instruction.name, instruction.frames[:1])

XLA prints one instruction on a line, except that a Pallas kernel's attributes may contain line breaks. Lists of more
than five carry comments such as `/*index=5*/`. The tables FileNames, FunctionNames, FileLocations and StackFrames at
the head of the text say where `stack_frame_id` of an instruction is in the source.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

HEADER = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) \(.*\{$")
INSTRUCTION = re.compile(r"^\s+(?P<root>ROOT )?%?(?P<name>[\w.\-]+) = (?P<type>.*?) (?P<opcode>[a-z][\w\-]*)\(")
END = re.compile(r"^\}(?:, execution_thread=.*)?$")
COMMENT = re.compile(r"/\*.*?\*/")
# Strings and brackets, and the commas between operands or attributes.
TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[\[({\])},]', re.DOTALL)
ATTRIBUTE = re.compile(r"\s*([\w\-]+)=(.*)", re.DOTALL)
CALLED = re.compile(r"(?:body|condition|to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)")
BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
OP_NAME = re.compile(r'op_name="([^"]*)"')
ESTIMATED_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
MAX_CYCLES = 2**60  # a larger estimate stands for "unknown"

FRAME_ID = re.compile(r"stack_frame_id=(\d+)")
TABLE = re.compile(r"^(FileNames|FunctionNames|FileLocations|StackFrames)$")
ROW = re.compile(r"^(\d+) (.*)$")
FIELD = re.compile(r"(\w+)=(\d+)")


@dataclass(frozen=True)
class SourceFrame:
    """A place in the Python source."""

    file: str
    function: str
    line: int


@dataclass(frozen=True)
class Instruction:
    """One instruction of HLO."""

    name: str
    opcode: str
    type: str
    text: str
    is_root: bool = False
    frames: tuple[SourceFrame, ...] = ()  # the Python source, innermost call first; () if the text does not say

    @cached_property
    def arguments(self) -> tuple[str, ...]:
        """What is in the parentheses: operands, or the value of a constant, or the number of a parameter."""
        return self._parts[0]

    @cached_property
    def operands(self) -> tuple[str, ...]:
        """Names of the instructions whose results this one reads."""
        if self.opcode in ("constant", "parameter"):
            return ()
        return tuple(argument.split()[-1].lstrip("%") for argument in self.arguments)

    @cached_property
    def attributes(self) -> Mapping[str, str]:
        """Attribute -> its value as written. Groups over a mesh also fill an attribute of their own, `device_ids`."""
        found = (ATTRIBUTE.fullmatch(piece) for piece in self._parts[1])
        return {attribute[1]: attribute[2] for attribute in found if attribute}

    @cached_property
    def _parts(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        start = INSTRUCTION.match(self.text)
        if start is None:
            raise ValueError(f"not an instruction of HLO: {self.text.strip()[:200]}")
        arguments, end = split_at_commas(self.text, start.end())
        attributes, _ = split_at_commas(self.text, end)
        return tuple(COMMENT.sub("", argument).strip() for argument in arguments), attributes

    @property
    def called_computations(self) -> list[str]:
        """Names of the computations that this instruction runs."""
        branches = BRANCHES.search(self.text)
        names = [name.strip().lstrip("%") for name in branches[1].split(",")] if branches else []
        return names + CALLED.findall(self.text)

    @property
    def op_name(self) -> str:
        """The path of the JAX code that this comes from, such as `jit(step)/while/body/dot_general`; "" if not said."""
        found = OP_NAME.search(self.text)
        return found[1] if found else ""

    @property
    def estimated_cycles(self) -> int | None:
        """The compiler's estimate of the time, in cycles of the device's clock; None if it has none."""
        found = ESTIMATED_CYCLES.search(self.text)
        cycles = int(found[1]) if found else None
        return cycles if cycles is not None and cycles <= MAX_CYCLES else None


@dataclass(frozen=True)
class Computation:
    """A list of instructions, in the order in which they run."""

    name: str
    instructions: tuple[Instruction, ...]

    @cached_property
    def by_name(self) -> Mapping[str, Instruction]:
        """Name -> instruction."""
        return {instruction.name: instruction for instruction in self.instructions}

    @cached_property
    def root(self) -> Instruction | None:
        """The instruction whose result is the computation's; None in an empty computation."""
        roots = [instruction for instruction in self.instructions if instruction.is_root]
        return (roots or list(self.instructions) or [None])[-1]


@dataclass(frozen=True)
class Module:
    """A compiled program."""

    entry: str  # name of the computation that runs first
    computations: Mapping[str, Computation]  # by name, in the order of the text


def parse_module(text: str) -> Module:
    """Parse what `compiled.as_text()` returns. Raises ValueError if it has no ENTRY computation."""
    entry, head = None, []
    computations: dict[str, list[list[str]]] = {}
    current: list[list[str]] | None = None
    for line in text.split("\n"):
        if header := HEADER.match(line):
            current = computations.setdefault(header["name"], [])
            entry = header["name"] if header["entry"] else entry
        elif current is None:
            head.append(line)
        elif INSTRUCTION.match(line):
            current.append([line])
        elif current and line and not END.match(line):
            current[-1].append(line)  # goes on with the instruction above
    if entry is None:
        raise ValueError(f"no ENTRY computation in {len(text)} characters of HLO; pass compiled.as_text()")
    frames = parse_frames(head)
    return Module(
        entry,
        {
            name: Computation(name, tuple(_instruction("\n".join(lines), frames) for lines in instructions))
            for name, instructions in computations.items()
        },
    )


def _instruction(text: str, frames: Mapping[int, tuple[SourceFrame, ...]]) -> Instruction:
    start = INSTRUCTION.match(text)
    frame = FRAME_ID.search(text)
    return Instruction(
        name=start["name"],
        opcode=start["opcode"],
        type=start["type"],
        text=text,
        is_root=start["root"] is not None,
        frames=frames.get(int(frame[1]), ()) if frame else (),
    )


def split_at_commas(text: str, start: int) -> tuple[tuple[str, ...], int]:
    """Split `text` from `start` at commas outside of brackets and strings. Stops behind a bracket that closes.

    Returns the parts that are not empty, and where it stopped.

    >>> split_at_commas('f(a, {b, c}, ")"), d', 2)
    (('a', '{b, c}', '")"'), 17)
    """
    pieces, depth, begin, end = [], 0, start, len(text)
    for token in TOKEN.finditer(text, start):
        if token[0] in "[({":
            depth += 1
        elif token[0] == "," and depth == 0:
            pieces.append(text[begin : token.start()])
            begin = token.end()
        elif token[0] in "])}":
            depth -= 1
            if depth < 0:
                end = token.end()
                pieces.append(text[begin : token.start()])
                break
    else:
        pieces.append(text[begin:])
    return tuple(piece.strip() for piece in pieces if piece.strip()), end


def parse_frames(lines: Iterable[str]) -> dict[int, tuple[SourceFrame, ...]]:
    """Read `stack_frame_id` -> frames of Python, innermost first, from the tables at the head of a module."""
    tables: dict[str, dict[int, str]] = {}
    rows: dict[int, str] = {}
    for line in lines:
        if title := TABLE.match(line):
            rows = tables.setdefault(title[1], {})
        elif row := ROW.match(line):
            rows[int(row[1])] = row[2]
    files, functions = (
        {number: name.strip('"') for number, name in tables.get(title, {}).items()}
        for title in ("FileNames", "FunctionNames")
    )
    places = {number: _fields(row) for number, row in tables.get("FileLocations", {}).items()}
    stack = {number: _fields(row) for number, row in sorted(tables.get("StackFrames", {}).items())}
    # jaxlib 0.10 prints parents one too high: the outermost frame, which is the first, has parent 1 and not 0.
    too_high = next(iter(stack.values()))["parent_frame_id"] if stack else 0
    frames: dict[int, tuple[SourceFrame, ...]] = {}
    for number, row in stack.items():  # a caller stands before its callees
        place = places.get(row["file_location_id"], {})
        frame = SourceFrame(
            files.get(place.get("file_name_id"), ""),
            functions.get(place.get("function_name_id"), ""),
            place.get("line", 0),
        )
        frames[number] = (frame, *frames.get(row["parent_frame_id"] - too_high, ()))
    return frames


def _fields(row: str) -> dict[str, int]:
    return {"file_location_id": 0, "parent_frame_id": 0} | {name: int(value) for name, value in FIELD.findall(row)}
