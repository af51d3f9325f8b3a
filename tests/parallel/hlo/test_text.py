"""Instructions, also of several lines, their operands and attributes, and the Python that they come from."""

import doctest

import pytest

from meshwright.parallel.hlo import text
from meshwright.parallel.hlo.text import SourceFrame, parse_module


def find(module, name):
    (instruction,) = [one.by_name[name] for one in module.computations.values() if name in one.by_name]
    return instruction


def line(written):
    module = parse_module(f"ENTRY %main (p: f32[4]) -> f32[4] {{\n  ROOT %one = {written}\n}}\n")
    return module.computations["main"].root


def test_the_examples_of_the_docstrings_hold():
    assert doctest.testmod(text).failed == 0


def test_text_without_an_entry_is_refused():
    with pytest.raises(ValueError, match="no ENTRY computation in 5 characters"):
        parse_module("hello")


def test_an_instruction_over_several_lines_is_one(printed):
    module = parse_module(printed["pallas_kernel"])
    kernel = find(module, "twice.1")
    assert kernel.opcode == "custom-call" and kernel.text.count("\n") == 2
    assert kernel.operands == ("get-tuple-element.36",)
    assert kernel.attributes["custom_call_target"] == '"tpu_custom_call"'
    assert '"block":"{\\"rows\\": 128}"' in kernel.attributes["frontend_attributes"]
    assert kernel.op_name == "jit(pallas_kernel)/shard_map/while/body/closed_call/twice/pallas_call"
    body = next(one for one in module.computations.values() if "twice.1" in one.by_name)
    assert [one.opcode for one in body.instructions].count("collective-permute-start") == 1  # the one behind it


def test_a_line_that_closes_a_thread_of_a_sparse_core_is_no_continuation(printed):
    module = parse_module(printed["sparse_core"])
    assert 'execution_thread="sparsecore"' in printed["sparse_core"]
    assert module.computations["called_computation"].root.attributes.keys() >= {"replica_groups", "to_apply"}
    assert not [i for one in module.computations.values() for i in one.instructions if "}, exec" in i.text]


def test_comments_in_long_lists_are_neither_types_nor_names(printed):
    loop = find(parse_module(printed["switch"]), "while.14")
    assert loop.attributes["body"].startswith("%wide.region")
    state = find(parse_module(printed["switch"]), loop.operands[0])
    assert "/*index=5*/" in state.text and len(state.operands) == 7
    assert all("*" not in name for name in state.operands)


PIECES = {
    "types before names": ("f32[4] add(f32[4]{0:T(8,128)} %x, f32[4] %y)", ("x", "y"), {}),
    "no percent signs": ("f32[4] add(x, y.1)", ("x", "y.1"), {}),
    "a constant": ("s32[2] constant({1, 2}), metadata={op_name=\"a, b\"}", (), {"metadata": '{op_name="a, b"}'}),
    "strings": ('f32[4] custom-call(%x), a="(,\\"", b={c="}"}', ("x",), {"a": '"(,\\""', "b": '{c="}"}'}),
    "groups": (
        "f32[4] all-reduce(%x), replica_groups=[4,2]<=[2,4]T(1,0), to_apply=%sum",
        ("x",),
        {"replica_groups": "[4,2]<=[2,4]T(1,0)", "to_apply": "%sum"},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("written", "operands", "attributes"), PIECES.values(), ids=PIECES)
def test_operands_and_attributes(written, operands, attributes):
    instruction = line(written)
    assert (instruction.operands, instruction.attributes) == (operands, attributes)


@pytest.mark.parametrize(
    ("written", "cycles"), [("2928", 2928), (str(2**60), 2**60), ("9223372036854775807", None), (None, None)]
)
def test_an_estimate_that_stands_for_unknown_is_none(written, cycles):
    config = "{}" if written is None else f'{{"window_config":{{"estimated_cycles":"{written}"}}}}'
    assert line(f"f32[4] copy(%p), backend_config={config}").estimated_cycles == cycles


def test_libtpu_estimates_cycles(printed):
    estimates = [
        one.estimated_cycles for one in parse_module(printed["switch"]).computations["main.7_spmd"].instructions
    ]
    assert 2928 in estimates and None in estimates


def test_a_frame_knows_its_callers(printed):
    """A layer's all-gather, and who calls the scan; the parents of the text are one too high."""
    frames = find(parse_module(printed["scan_gather"]), "all-gather.2").frames
    assert [frame.function for frame in frames][::-1][:3] == ["<module>", "programs", "compiled"]
    assert frames[0].function == "scan_gather.<locals>.layer" and "scan_gather" in {one.function for one in frames}
    assert {frame.file for frame in frames} == {"tests/parallel/hlo/make_fixtures.py"}


@pytest.mark.parametrize("shift", [0, 1], ids=["as they are", "one too high"])
def test_parents_of_frames(shift):
    head = (
        'HloModule jit_f\n\nFileNames\n1 "a.py"\n2 "b.py"\n\nFunctionNames\n1 "outer"\n2 "f.<locals>.g"\n\n'
        "FileLocations\n1 {file_name_id=1 function_name_id=1 line=3 end_line=3 column=1 end_column=2}\n"
        "2 {file_name_id=2 function_name_id=2 line=7 end_line=7 column=1 end_column=2}\n\n"
        f"StackFrames\n1 {{file_location_id=1 parent_frame_id={shift}}}\n"
        f"2 {{file_location_id=2 parent_frame_id={1 + shift}}}\n\n\n"
        "ENTRY %main (p: f32[]) -> f32[] {\n  %p = f32[] parameter(0)\n"
        '  ROOT %n = f32[] negate(%p), metadata={op_name="neg" stack_frame_id=2}\n}\n'
    )
    module = parse_module(head)
    assert find(module, "n").frames == (SourceFrame("b.py", "f.<locals>.g", 7), SourceFrame("a.py", "outer", 3))
    assert find(module, "p").frames == ()
