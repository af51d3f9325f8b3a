"""Every mistake in a table is found, and the error names the cell."""

from dataclasses import replace

import numpy as np
import pytest

from meshwright.configs.errors import UserError
from meshwright.parallel.pipeline.tables.schedules.registry import make_table
from meshwright.parallel.pipeline.tables.table import Op
from meshwright.parallel.pipeline.tables.validate import check_table


def table(algorithm=0):
    """1F1B on two devices with two microbatches.

    F0 F1 .. I0 W0 .. I1 W1
    .. F0 I0 W0 F1 I1 W1 ..
    """
    return make_table("1f1b", devices=2, microbatches=2, vocabulary=algorithm)


def changed(**cells):
    """The table with some cells replaced: field -> {(tick, device): value}."""
    table_copy = table()
    arrays = {field: getattr(table_copy, field).copy() for field in cells}
    for field, values in cells.items():
        for cell, value in values.items():
            arrays[field][cell] = value
    return replace(table_copy, **arrays)


def swap_cells(first, second):
    """The table with two cells exchanged, all four fields."""
    table_copy = table()
    arrays = {field: getattr(table_copy, field).copy() for field in ("op", "microbatch", "chunk", "slot")}
    for array in arrays.values():
        array[first], array[second] = array[second], array[first]
    return replace(table_copy, **arrays)


WRONG = {
    "I before the I of the next stage": (
        lambda: swap_cells((2, 0), (3, 0)),
        r"tick 2, device 0: I of microbatch 0 of chunk 0 needs I\(microbatch 0, stage 1\), which device 1 does at",
    ),
    "F before the F of the previous stage": (
        lambda: swap_cells((0, 1), (1, 1)),
        r"tick 0, device 1: F of microbatch 0 of chunk 0 needs F\(.*, stage 0\), which device 0 does at tick 0",
    ),
    "W before its I": (lambda: swap_cells((3, 0), (4, 0)), r"tick 3, device 0: W .* needs I\(microbatch 0, stage 0\)"),
    "twice": (
        lambda: changed(microbatch={(1, 0): 0}),
        r"tick 1, device 0: F of microbatch 0 of chunk 0: F\(microbatch 0, stage 0\) was done before, at tick 0",
    ),
    "never": (
        lambda: changed(op={(7, 0): Op.IDLE}, microbatch={(7, 0): -1}, chunk={(7, 0): -1}, slot={(7, 0): -1}),
        r"device 0 never does W\(microbatch 1, stage 0\)",
    ),
    "a slot still in use": (
        lambda: changed(slot={(1, 0): 0, (6, 0): 0, (7, 0): 0}),
        r"tick 1, device 0: F of microbatch 1 of chunk 0: slot 0 holds microbatch 0 of chunk 0 until tick 4",
    ),
    "another's slot": (
        lambda: changed(slot={(4, 0): 1}),
        r"tick 4, device 0: W .*: slot 1 does not hold its activation",
    ),
    "no slot": (lambda: changed(slot={(0, 0): -1}), r"tick 0, device 0: F .*: slot -1; slots count from 0"),
    "no such microbatch": (lambda: changed(microbatch={(0, 0): 2}), r"tick 0, device 0: .*: microbatches are 0 .. 1"),
    "no such chunk": (lambda: changed(chunk={(0, 0): 1}), r"tick 0, device 0: .*: chunks are 0 .. 0"),
    "no such op": (lambda: changed(op={(0, 0): 9}), "tick 0, device 0: op 9; ops are 0 IDLE, 1 F"),
    "idle with a number": (
        lambda: changed(microbatch={(0, 1): 0}),
        "tick 0, device 1: idle, with microbatch 0; use -1",
    ),
    "S without an algorithm": (lambda: changed(op={(0, 0): Op.S}), "tick 0, device 0: S .* algorithm 0; use 1 or 2"),
    "no such algorithm": (lambda: replace(table(), algorithm=3), "algorithm 3; there are 0"),
    "a stage twice": (lambda: replace(table(), placement=np.array([[0], [0]])), "placement .* stage 0 .. 1"),
    "not integers": (lambda: replace(table(), slot=table().slot * 1.0), r"slot is float64\(8, 2\); all are integers"),
    "I before the barrier": (
        lambda: replace(table(algorithm=2), algorithm=1),
        r"I of microbatch 0 of chunk 0 needs T\(microbatch 0, device 0\)",
    ),
}


@pytest.mark.parametrize(("broken", "message"), WRONG.values(), ids=WRONG)
def test_a_broken_table_is_refused_and_the_cell_named(broken, message):
    with pytest.raises(UserError, match=message):
        check_table(broken())


def test_a_backward_cell_may_be_fused():
    """B stands for I and W: a table with B instead of I and idle instead of W is a schedule."""
    table_copy = table()
    arrays = {field: getattr(table_copy, field).copy() for field in ("op", "microbatch", "chunk", "slot")}
    arrays["op"][table_copy.op == Op.I] = Op.B
    for field, empty in (("op", 0), ("microbatch", -1), ("chunk", -1), ("slot", -1)):
        arrays[field][table_copy.op == Op.W] = empty
    check_table(replace(table_copy, **arrays))
