"""How often each computation of compiled HLO runs: the lengths of its loops.

    for name, runs in count_runs(module).items(): print(name, runs.count, runs.under_conditional)

XLA for CPUs and GPUs writes the number of rounds of a loop down. libtpu does not: then it follows from the loop's
condition, the values that it starts from, and what its body adds to them in each round.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from .text import Computation, Instruction, Module

KNOWN_TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
INTEGER = re.compile(r"[su]\d+\[\]")  # the type of an integer
# Instructions that pass on a value, or an element of a tuple, as it is. (A copy that runs in the background is two.)
SAME_VALUE = ("copy", "copy-start", "copy-done", "bitcast", "reshape", "opt-barrier", "optimization-barrier")


@dataclass(frozen=True)
class Runs:
    """How often a computation runs in one run of the program."""

    count: int
    under_conditional: bool  # inside a branch or a loop of unknown length, which some devices may skip


@dataclass(frozen=True, eq=False)
class Scope:
    """A computation together with the instruction that runs it, which says what its parameters are."""

    module: Module
    computation: Computation
    caller: "Scope | None" = None
    call: Instruction | None = None

    def enter(self, call: Instruction, name: str) -> "Scope":
        """The computation `name` as `call`, an instruction of this one, runs it; empty if the text does not have it."""
        name = name.removeprefix("%")
        return Scope(self.module, self.module.computations.get(name, Computation(name, ())), self, call)


@dataclass(frozen=True)
class Element:
    """An element of the state of a loop at the beginning of a round."""

    scope: Scope  # of the loop
    loop: str
    index: int | None  # None: the state is not a tuple


@dataclass(frozen=True)
class LinearValue:
    """An integer: a constant, plus elements of the states of loops times their factors."""

    constant: int
    factors: Mapping[Element, int] = field(default_factory=dict)

    def plus(self, value: "LinearValue", factor: int = 1) -> "LinearValue":
        """This plus `value` times `factor`."""
        sums = dict(self.factors)
        for element, number in value.factors.items():
            sums[element] = sums.get(element, 0) + factor * number
        return LinearValue(
            self.constant + factor * value.constant, {element: number for element, number in sums.items() if number}
        )


def count_runs(module: Module) -> dict[str, Runs]:
    """Computation -> how often it runs, if the entry reaches it. A loop of unknown length counts as one round."""
    runs: dict[str, Runs] = {}

    def visit(scope: Scope, count: int, conditional: bool) -> None:
        name = scope.computation.name
        before = runs.get(name, Runs(0, False))
        runs[name] = Runs(before.count + count, before.under_conditional or conditional)
        for instruction in scope.computation.instructions:
            trips = trip_count(scope, instruction) if instruction.opcode == "while" else None
            # A loop whose trip count is unknown at compile time may be one that some devices skip.
            may_skip = instruction.opcode == "conditional" or (instruction.opcode == "while" and trips is None)
            for called in entered_computations(instruction):
                rounds = count * (1 if trips is None else trips)
                visit(scope.enter(instruction, called), rounds, conditional or may_skip)

    visit(Scope(module, module.computations[module.entry]), 1, False)
    return runs


def entered_computations(instruction: Instruction) -> list[str]:
    """Names of the computations that start at `instruction`; what an async-start starts only ends at its done."""
    return [] if instruction.opcode.endswith(("-done", "-update")) else instruction.called_computations


def trip_count(scope: Scope, loop: Instruction) -> int | None:
    """Return the number of rounds of the while instruction `loop` in `scope`; None if the text does not say it."""
    if written := KNOWN_TRIP_COUNT.search(loop.text):
        return int(written[1])
    found = find_comparison(scope.enter(loop, loop.attributes["condition"]))
    if found is None:
        return None
    inside, comparison = found
    first, second = (evaluate(inside, operand) for operand in comparison.operands)
    if first is None or second is None:
        return None
    difference = first.plus(second, -1)  # is compared with 0

    def at_start(element: Element) -> LinearValue | None:
        return initial_value(element) if _is_of(element, scope, loop) else LinearValue(0, {element: 1})

    start = constant_of(substitute(difference, at_start))
    step = 0
    for element, factor in difference.factors.items():
        change = constant_of(change_per_round(element)) if _is_of(element, scope, loop) else 0
        if change is None:
            return None
        step += factor * change
    return None if start is None else count_rounds(start, step, comparison.attributes["direction"])


def count_rounds(start: int, step: int, direction: str) -> int | None:
    """How many of start, start + step, ... are less than 0 (LT), at most 0 (LE), ... before the first that is not.

    None if there is no such first one, or the `direction` is an unknown word.

    >>> count_rounds(-7, 2, "LT"), count_rounds(6, -2, "NE"), count_rounds(-1, -1, "LT")
    (4, 3, None)
    """
    if direction in ("GT", "GE"):
        return count_rounds(-start, -step, {"GT": "LT", "GE": "LE"}[direction])
    if direction == "LE":
        return count_rounds(start - 1, step, "LT")
    if direction not in ("LT", "NE"):
        return None
    if start == 0 or (direction == "LT" and start > 0):
        return 0
    if step == 0 or (start < 0) != (step > 0):
        return None
    rounds, rest = divmod(abs(start), abs(step))
    if direction == "NE":
        return rounds if rest == 0 else None
    return rounds + (rest > 0)


def find_comparison(scope: Scope, name: str | None = None) -> tuple[Scope, Instruction] | None:
    """Return the comparison that the result of a condition is, and its scope; it may be inside a fusion.

    `name` is an instruction of `scope`, by default the root. None if the result is anything else.
    """
    computation = scope.computation
    instruction = computation.root if name is None else computation.by_name.get(name)
    if instruction is None:
        return None
    if instruction.opcode == "compare":
        return scope, instruction
    if instruction.opcode in ("fusion", "call"):
        return find_comparison(scope.enter(instruction, instruction.called_computations[0]))
    if instruction.opcode in SAME_VALUE:
        return find_comparison(scope, instruction.operands[0])
    return None


def evaluate(scope: Scope, name: str, index: int | None = None) -> LinearValue | None:
    """Return the result of an instruction of `scope`, or element `index` of it; None if it is not linear."""
    instruction = scope.computation.by_name.get(name)
    if instruction is None:
        return None
    opcode, operands = instruction.opcode, instruction.operands
    if opcode in SAME_VALUE or (opcode == "convert" and INTEGER.match(instruction.type)):
        return evaluate(scope, operands[0], index)
    if opcode == "constant" and INTEGER.match(instruction.type):
        return LinearValue(int(instruction.arguments[0]))
    if opcode == "get-tuple-element":
        return evaluate(scope, operands[0], int(instruction.attributes["index"])) if index is None else None
    if opcode == "tuple":
        return evaluate(scope, operands[index]) if index is not None else None
    if opcode in ("add", "subtract"):
        first, second = (evaluate(scope, operand) for operand in operands)
        return None if first is None or second is None else first.plus(second, 1 if opcode == "add" else -1)
    if opcode in ("fusion", "call"):
        return _root_value(scope.enter(instruction, instruction.called_computations[0]), index)
    if opcode == "while":
        element = Element(scope, name, index)
        return initial_value(element) if is_invariant(element) else None
    if opcode == "parameter":
        return _parameter_value(scope, int(instruction.arguments[0]), index)
    return None


def _parameter_value(scope: Scope, number: int, index: int | None) -> LinearValue | None:
    """`evaluate` of a parameter: an element of a loop's state, or an operand of what runs the computation."""
    caller, call = scope.caller, scope.call
    if caller is None or call is None:
        return None  # an argument of the program
    if call.opcode == "while":
        return LinearValue(0, {Element(caller, call.name, index): 1})
    if call.opcode == "conditional":
        branches = call.called_computations
        if branches.count(scope.computation.name) > 1:
            return None  # each of them has its own operand
        number = 1 + branches.index(scope.computation.name)
    elif call.opcode not in ("fusion", "call"):
        return None
    return evaluate(caller, call.operands[number], index)


def _root_value(scope: Scope, index: int | None) -> LinearValue | None:
    root = scope.computation.root
    return None if root is None else evaluate(scope, root.name, index)


def initial_value(element: Element) -> LinearValue | None:
    """Return what an element of a loop's state is before the first round."""
    loop = element.scope.computation.by_name[element.loop]
    return evaluate(element.scope, loop.operands[0], element.index)


def change_per_round(element: Element) -> LinearValue | None:
    """Return what a round of its loop adds to `element`."""
    loop = element.scope.computation.by_name[element.loop]
    after = _root_value(element.scope.enter(loop, loop.attributes["body"]), element.index)
    return None if after is None else after.plus(LinearValue(0, {element: 1}), -1)


def is_invariant(element: Element) -> bool:
    """Whether every round of its loop passes `element` on as it is."""
    return change_per_round(element) == LinearValue(0)


def substitute(value: LinearValue | None, replace: Callable[[Element], LinearValue | None]) -> LinearValue | None:
    """Put `replace(element)` in the place of each element; None if one has no replacement."""
    if value is None:
        return None
    total = LinearValue(value.constant)
    for element, factor in value.factors.items():
        replacement = replace(element)
        if replacement is None:
            return None
        total = total.plus(replacement, factor)
    return total


def constant_of(value: LinearValue | None) -> int | None:
    """Return the number that `value` is in every round of every loop around it; None if it changes, or is unknown."""
    while value is not None and value.factors:
        if not all(is_invariant(element) for element in value.factors):
            return None
        value = substitute(value, initial_value)
    return None if value is None else value.constant


def _is_of(element: Element, scope: Scope, loop: Instruction) -> bool:
    return element.scope is scope and element.loop == loop.name
