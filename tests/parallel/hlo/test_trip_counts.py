"""The number of rounds of a loop, where the text does not say it."""

import doctest
import re

import pytest

from meshwright.parallel.hlo import trip_counts
from meshwright.parallel.hlo.text import parse_module
from meshwright.parallel.hlo.trip_counts import Runs, count_rounds, count_runs


def test_the_examples_of_the_docstrings_hold():
    assert doctest.testmod(trip_counts).failed == 0


@pytest.mark.parametrize("direction", ["LT", "LE", "GT", "GE", "NE"])
def test_rounds_equal_those_of_the_loop_itself(direction):
    holds = {
        "LT": lambda value: value < 0,
        "LE": lambda value: value <= 0,
        "GT": lambda value: value > 0,
        "GE": lambda value: value >= 0,
        "NE": lambda value: value != 0,
    }[direction]
    for start in range(-9, 10):
        for step in range(-4, 5):
            rounds, value = 0, start
            while holds(value) and rounds < 50:
                rounds, value = rounds + 1, value + step
            assert count_rounds(start, step, direction) == (rounds if rounds < 50 else None)


def test_another_direction_is_unknown():
    assert count_rounds(-3, 1, "EQ") is None


CONDITION = """
%condition (state: (s32[], f32[4], s32[], s32[])) -> pred[] {
  %state = (s32[], f32[4], s32[], s32[]) parameter(0)
  %limit = s32[]{:T(128)} constant(7)
  %i = s32[] get-tuple-element(%state), index=0
  ROOT %done = pred[] compare(%i, %limit), direction=LT
}
"""
BODY = """
%body (state.1: (s32[], f32[4], s32[], s32[])) -> (s32[], f32[4], s32[], s32[]) {
  %state.1 = (s32[], f32[4], s32[], s32[]) parameter(0)
  %one = s32[] constant(1)
  %i.1 = s32[] get-tuple-element(%state.1), index=0
  %x = f32[4] get-tuple-element(%state.1), index=1
  %j = s32[] get-tuple-element(%state.1), index=2
  %k = s32[] get-tuple-element(%state.1), index=3
  %next = s32[] add(%i.1, %one)
  ROOT %after = (s32[], f32[4], s32[], s32[]) tuple(%next, %x, %j, %k)
}
"""
ENTRY = """
ENTRY %main (p: f32[4]) -> f32[4] {
  %p = f32[4] parameter(0)
  %zero = s32[] constant(0)
  %ten = s32[] constant(10)
  %two = s32[] constant(2)
  %before = (s32[], f32[4], s32[], s32[]) tuple(%zero, %p, %ten, %two)
  %loop = (s32[], f32[4], s32[], s32[]) while(%before), condition=%condition, body=%body
  ROOT %result = f32[4] get-tuple-element(%loop), index=1
}
"""
PASSED = "%limit = s32[] get-tuple-element(%state), index=2"  # the limit comes through the state
FUSED = """
%fused (a: s32[], b: s32[]) -> pred[] {
  %a = s32[] parameter(0)
  %b = s32[] parameter(1)
  ROOT %lt = pred[] compare(%b, %a), direction=GT
}
"""
LIMIT = "%limit = s32[]{:T(128)} constant(7)"
STEP = "%one = s32[] constant(1)"
ADD = "%next = s32[] add(%i.1, %one)"
COMPARE = "ROOT %done = pred[] compare(%i, %limit), direction=LT"

CASES = {
    "as it is": ({}, 7),
    "at most": ({"direction=LT": "direction=LE"}, 8),
    "exactly": ({"direction=LT": "direction=NE"}, 7),
    "never met": ({"direction=LT": "direction=NE", STEP: "%one = s32[] constant(2)"}, None),
    "from behind": ({"compare(%i, %limit), direction=LT": "compare(%limit, %i), direction=GT"}, 7),
    "a limit in the state": ({LIMIT: PASSED}, 10),
    "a step in the state": ({STEP: "%one = s32[] get-tuple-element(%state.1), index=3"}, 4),
    "a copied limit": ({"tuple(%zero, %p, %ten, %two)": "tuple(%zero, %p, %c, %two)", LIMIT: PASSED,
                        "%two = s32[] constant(2)": "%two = s32[] constant(2)\n  %c = s32[] copy(%ten)"}, 10),
    "a copy in the background": ({ADD: "%s = (s32[], s32[], u32[]) copy-start(%i.1)\n  %d = s32[] copy-done(%s)\n"
                                       "  %next = s32[] add(%one, %d)"}, 7),
    "subtracted": ({ADD: "%next = s32[] subtract(%i.1, %one)", STEP: "%one = s32[] constant(-3)"}, 3),
    "down": ({ADD: "%next = s32[] subtract(%i.1, %one)", "%zero = s32[] constant(0)": "%zero = s32[] constant(9)",
              "direction=LT": "direction=GE"}, 3),
    "not one round": ({LIMIT: "%limit = s32[] constant(-7)"}, 0),
    "without an end": ({ADD: "%next = s32[] subtract(%i.1, %one)"}, None),
    "a fused comparison": ({COMPARE: "ROOT %done = pred[] fusion(%i, %limit), kind=kLoop, calls=%fused"}, 7),
    "fused, swapped": ({COMPARE: "ROOT %done = pred[] fusion(%limit, %i), kind=kLoop, calls=%fused"}, 0),
    "compared with the argument": ({LIMIT: PASSED, "%ten = s32[] constant(10)": "%ten = s32[] parameter(1)"}, None),
    "a limit that changes": ({LIMIT: PASSED, "tuple(%next, %x, %j, %k)": "tuple(%next, %x, %i.1, %k)"}, None),
    "a step that changes": ({STEP: "%one = s32[] get-tuple-element(%state.1), index=3",
                             "tuple(%next, %x, %j, %k)": "tuple(%next, %x, %j, %next)"}, None),
    "multiplied": ({ADD: "%next = s32[] multiply(%i.1, %one)"}, None),
    "a float": ({LIMIT: "%limit = f32[] constant(7)"}, None),
    "written down": ({"body=%body": 'body=%body, backend_config={"known_trip_count":{"n":"5"}}'}, 5),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "count"), CASES.values(), ids=CASES)
def test_a_loop_is_counted_by_its_condition_start_and_step(changes, count):
    text = FUSED + CONDITION + BODY + ENTRY
    for before, after in changes.items():
        assert before in text
        text = text.replace(before, after)
    runs = count_runs(parse_module(text))
    assert runs["body"] == Runs(1 if count is None else count, count is None)


def test_a_limit_passes_through_a_loop_and_a_branch():
    """The loop runs in a branch of a conditional, in a round of another loop, whose state has the limit."""
    inner = ENTRY.replace("ENTRY %main (p: f32[4]) -> f32[4]", "%branch (q: (s32[], f32[4], s32[])) -> f32[4]")
    inner = inner.replace("%p = f32[4] parameter(0)", "%q = (s32[], f32[4], s32[]) parameter(0)")
    inner = inner.replace("%ten = s32[] constant(10)", "%ten = s32[] get-tuple-element(%q), index=2")
    outer = """
%rounds (s: (s32[], f32[4], s32[])) -> pred[] {
  %s = (s32[], f32[4], s32[]) parameter(0)
  %i.2 = s32[] get-tuple-element(%s), index=0
  %three = s32[] constant(3)
  ROOT %lt.2 = pred[] compare(%i.2, %three), direction=LT
}

%round (t: (s32[], f32[4], s32[])) -> (s32[], f32[4], s32[]) {
  %t = (s32[], f32[4], s32[]) parameter(0)
  %i.3 = s32[] get-tuple-element(%t), index=0
  %n.3 = s32[] get-tuple-element(%t), index=2
  %one.3 = s32[] constant(1)
  %next.3 = s32[] add(%i.3, %one.3)
  %y = f32[4] conditional(%i.3, %y0, %t), branch_computations={%idle, %branch}
  ROOT %after.3 = (s32[], f32[4], s32[]) tuple(%next.3, %y, %n.3)
}

ENTRY %main (p: f32[4]) -> f32[4] {
  %p = f32[4] parameter(0)
  %zero.4 = s32[] constant(0)
  %six = s32[] constant(6)
  %before.4 = (s32[], f32[4], s32[]) tuple(%zero.4, %p, %six)
  %loop.4 = (s32[], f32[4], s32[]) while(%before.4), condition=%rounds, body=%round
  ROOT %result.4 = f32[4] get-tuple-element(%loop.4), index=1
}
"""
    condition = CONDITION.replace(LIMIT, PASSED)
    runs = count_runs(parse_module(condition + BODY + inner + outer))
    assert runs["round"] == Runs(3, False) and runs["branch"] == Runs(3, True)
    assert runs["body"] == Runs(3 * 6, True)


TPU_COUNTS = {
    "scan_gather": [7],
    "nested_scan": [5, 15],
    "count_down": [5],
    "pallas_kernel": [7],
    "switch": [7],
    "async_fusion": [7, 7],
    "sparse_core": [7, 7],
    "pipeline": [30],
    "dynamic_count": [None],
    "data_dependent": [None],
}


@pytest.mark.parametrize(("name", "counts"), TPU_COUNTS.items(), ids=TPU_COUNTS)
def test_loops_of_libtpu_are_counted(printed, name, counts):
    assert "known_trip_count" not in printed[name]
    runs = count_runs(parse_module(printed[name]))
    bodies = [runs[body] for body in re.findall(r"body=%([\w.\-]+)", printed[name])]
    found = [None if one.under_conditional else one.count for one in bodies]
    assert sorted(found, key=str) == sorted(counts, key=str)
