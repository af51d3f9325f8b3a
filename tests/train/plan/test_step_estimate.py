"""The estimate of small programs, written down as libtpu writes them, against sums made by hand."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from meshwright.configs.hardware_targets import parse_topology
from meshwright.train.plan.step_estimate import estimate_step

TOPOLOGY = parse_topology("v5p:2x2x1")  # 1.75 GHz, 2.765 TB/s, 90 GB/s a link, which are no rings
MESH = SimpleNamespace(
    devices=np.array(
        [
            SimpleNamespace(coords=(x, y, 0), core_on_chip=0, slice_index=0, process_index=0)
            for x in range(2)
            for y in range(2)
        ],
        dtype=object,
    ),
    axis_names=("fsdp",),
)
TABLES = """HloModule jit_step

FileNames
1 "/src/meshwright/models/context.py"
2 "/src/meshwright/models/attention/tile.py"
3 "/src/meshwright/train/objectives/loss_heads.py"

FunctionNames
1 "linear"
2 "scores"
3 "apply"

FileLocations
1 {file_name_id=1 function_name_id=1 line=28}
2 {file_name_id=2 function_name_id=2 line=7}
3 {file_name_id=3 function_name_id=3 line=50}

StackFrames
1 {file_location_id=3 parent_frame_id=1}
2 {file_location_id=1 parent_frame_id=2}
3 {file_location_id=2 parent_frame_id=2}
"""


def estimate(body):
    return estimate_step(TABLES + "\n" + body, mesh=MESH, topology=TOPOLOGY)


def fusion(name, operand, cycles, frame, calls="%computed"):
    return (
        f"  %{name} = f32[1024]{{0}} fusion(%{operand}), kind=kLoop, calls={calls}, "
        f'metadata={{op_name="jit(step)/x" stack_frame_id={frame}}}, '
        f'backend_config={{"window_config":{{"estimated_cycles":"{cycles}"}}}}\n'
    )


COMPUTED = "%computed (p: f32[1024]) -> f32[1024] {\n  ROOT %p = f32[1024]{0} parameter(0)\n}\n\n"
MATMUL = (
    "%matmul (p: f32[1024]) -> f32[1024] {\n  %p = f32[1024]{0} parameter(0)\n"
    "  ROOT %c = f32[1024]{0} convolution(%p, %p), dim_labels=b_0->b_0\n}\n\n"
)


def test_operations_are_summed_by_part_and_by_line():
    found = estimate(
        COMPUTED
        + MATMUL
        + "ENTRY %main (a: f32[1024]) -> f32[1024] {\n  %a = f32[1024]{0} parameter(0)\n"
        + fusion("f", "a", 1_750_000, 2, "%matmul")
        + fusion("g", "f", 3_500_000, 3)
        + "  ROOT %t = (f32[1024]) tuple(%g)\n}\n"
    )
    assert found.seconds == pytest.approx(3e-3)
    assert found.by_part() == pytest.approx({"attention": 2e-3, "products": 1e-3})
    assert found.by_source()[0] == ("models/attention/tile.py:7", pytest.approx(2e-3))
    assert not found.unknown


LOOP = (
    "%condition (s: (s32[], f32[1024])) -> pred[] {\n  %s = (s32[], f32[1024]) parameter(0)\n"
    "  %i = s32[] get-tuple-element(%s), index=0\n  %n = s32[] constant(7)\n"
    "  ROOT %less = pred[] compare(%i, %n), direction=LT\n}\n\n"
    "%body (s: (s32[], f32[1024])) -> (s32[], f32[1024]) {\n  %s = (s32[], f32[1024]) parameter(0)\n"
    "  %i = s32[] get-tuple-element(%s), index=0\n  %x = f32[1024]{0} get-tuple-element(%s), index=1\n"
    "  %one = s32[] constant(1)\n  %next = s32[] add(%i, %one)\n"
    + fusion("f", "x", 1_750_000, 2)
    + "  ROOT %t = (s32[], f32[1024]) tuple(%next, %f)\n}\n\n"
)


def test_a_loop_runs_as_often_as_its_condition_says():
    found = estimate(
        COMPUTED + LOOP + "ENTRY %main (a: f32[1024]) -> (s32[], f32[1024]) {\n  %a = f32[1024]{0} parameter(0)\n"
        "  %zero = s32[] constant(0)\n  %t = (s32[], f32[1024]) tuple(%zero, %a)\n"
        "  ROOT %w = (s32[], f32[1024]) while(%t), condition=%condition, body=%body\n}\n"
    )
    assert found.seconds == pytest.approx(7e-3)
    assert [(cost.runs, cost.part) for cost in found.costs] == [(7, "other layers")]


def test_a_loop_of_unknown_length_is_counted_once_and_said_to_be_unknown():
    found = estimate(
        COMPUTED
        + LOOP
        + "ENTRY %main (a: f32[1024], n: s32[]) -> (s32[], f32[1024]) {\n  %a = f32[1024]{0} parameter(0)\n"
        "  %n = s32[] parameter(1)\n  %t = (s32[], f32[1024]) tuple(%n, %a)\n"
        "  ROOT %w = (s32[], f32[1024]) while(%t), condition=%condition, body=%body\n}\n"
    )
    assert found.seconds == pytest.approx(1e-3)
    assert any("rounds of a loop" in what for what in found.unknown)


GATHER = "(f32[22500000]{0}, f32[90000000]{0}) all-gather-start(%a), replica_groups={{0,1,2,3}}, dimensions={0}"


def gathered(between):
    """An all-gather of 360 MB over two lines of two, which needs 3/4 of 2 ms, with an operation beside it."""
    return estimate(
        COMPUTED + "ENTRY %main (a: f32[22500000]) -> f32[90000000] {\n  %a = f32[22500000]{0} parameter(0)\n"
        f"  %s = {GATHER}\n" + between + "  ROOT %d = f32[90000000]{0} all-gather-done(%s)\n}\n"
    )


def test_a_collective_is_hidden_as_far_as_other_work_runs():
    (cost,) = gathered("").collectives
    assert (cost.link_seconds, cost.exposed_seconds) == pytest.approx((1.5e-3, 1.5e-3)) and not cost.synchronous
    found = gathered(fusion("f", "a", 1_750_000, 2))
    assert found.seconds == pytest.approx(1.5e-3) and found.by_part()["collectives"] == pytest.approx(0.5e-3)
    assert gathered(fusion("f", "a", 3_500_000, 2)).seconds == pytest.approx(2e-3)


def test_a_synchronous_collective_is_named():
    found = estimate(
        "ENTRY %main (a: f32[90000000]) -> f32[90000000] {\n  %a = f32[90000000]{0} parameter(0)\n"
        "  ROOT %r = f32[90000000]{0} all-reduce(%a), replica_groups={{0,1,2,3}}, to_apply=%add\n}\n\n"
        "%add (x: f32[], y: f32[]) -> f32[] {\n  %x = f32[] parameter(0)\n  %y = f32[] parameter(1)\n"
        "  ROOT %z = f32[] add(%x, %y)\n}\n"
    )
    (cost,) = found.collectives
    assert cost.synchronous and cost.kind == "all-reduce" and cost.axes == ("fsdp",)
    assert found.seconds == pytest.approx(3e-3)


def test_of_the_branches_of_a_conditional_the_longest_counts():
    branch = "%{0} (p: f32[1024]) -> f32[1024] {{\n  %p = f32[1024]{{0}} parameter(0)\n{1}}}\n\n"
    root = lambda cycles: fusion("f", "p", cycles, 2).replace("  %f", "  ROOT %f")
    found = estimate(
        COMPUTED
        + branch.format("short", root(1_750_000))
        + branch.format("long", root(7_000_000))
        + "ENTRY %main (a: f32[1024], i: s32[]) -> f32[1024] {\n  %a = f32[1024]{0} parameter(0)\n"
        "  %i = s32[] parameter(1)\n"
        "  ROOT %c = f32[1024]{0} conditional(%i, %a, %a), branch_computations={%short, %long}\n}\n"
    )
    assert found.seconds == pytest.approx(4e-3)


def test_a_kernel_that_nobody_measured_is_not_guessed():
    found = estimate(
        "ENTRY %main (a: f32[1024]) -> f32[1024] {\n  %a = f32[1024]{0} parameter(0)\n"
        '  ROOT %strange.3 = f32[1024]{0} custom-call(%a), custom_call_target="tpu_custom_call"\n}\n'
    )
    assert found.seconds == 0 and dict(found.unknown) == {"kernel strange: not measured": 1}


def test_a_collective_that_libtpu_spreads_over_fusions_is_counted_once():
    text = (Path(__file__).parents[2] / "parallel/hlo/fixtures/async_fusion.txt").read_text()
    found = estimate_step(text, mesh=MESH, topology=TOPOLOGY)
    gathers = [cost for cost in found.collectives if cost.kind == "all-gather"]
    assert [cost.bytes / cost.runs for cost in gathers] == [2 * 2048 * 2048] * 2
    assert sorted(cost.synchronous for cost in gathers) == [False, True]  # of the backward and of the forward pass
