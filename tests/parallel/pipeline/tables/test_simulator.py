"""The simulator, against tables small enough to compute by hand."""

import numpy as np
import pytest

from meshwright.configs.errors import UserError
from meshwright.parallel.pipeline.tables.costs import Costs, read_costs
from meshwright.parallel.pipeline.tables.fused_backward import fuse_backward
from meshwright.parallel.pipeline.tables.lowering import lower_table
from meshwright.parallel.pipeline.tables.schedules.registry import make_table
from meshwright.parallel.pipeline.tables.simulator import pool_bytes, simulate, stash_bytes
from meshwright.parallel.pipeline.tables.table import Op

COSTS = Costs(forward=2.0, input_gradient=3.0, weight_gradient=5.0)


def one_microbatch(name="1f1b", devices=2, **more):
    return make_table(name, devices=devices, microbatches=1, **more)


def test_passes_follow_each_other_through_two_stages():
    """F on both stages, I back, each W after its I: 2 + 2 + 3 + 3 + 5, and one message in each direction."""
    timeline = simulate(one_microbatch(), COSTS.model_copy(update={"communication": 0.5}))
    assert timeline.makespan == 2 + 0.5 + 2 + 3 + 0.5 + 3 + 5
    np.testing.assert_array_equal(timeline.busy, [10, 10])
    assert timeline.bubble == pytest.approx(1 - 10 / 16)
    assert timeline.start[0, 0] == 0 and timeline.end[-1, 0] == 16
    assert timeline.bubble_between_steps == pytest.approx(1 - 10 / 16), "device 0 is the first and the last"


def test_a_lock_step_tick_costs_its_slowest_device():
    """F. .F .I IW W. : 2 + 2 + 3 + max(3, 5) + 5; with one core the fourth tick takes 3 + 5."""
    table = one_microbatch()
    assert simulate(table, COSTS).lockstep == 2 + 2 + 3 + 5 + 5
    assert simulate(table, COSTS, cores=1).lockstep == 2 + 2 + 3 + 8 + 5
    assert simulate(table, COSTS, cores=2).lockstep == 17
    per_tick = COSTS.model_copy(update={"communication": 0.5, "tick": 0.25})
    assert simulate(table, per_tick).lockstep == 17 + 5 * 0.75


def test_a_chunk_costs_its_share_of_the_device():
    timeline = simulate(one_microbatch("zb-v"), COSTS)
    np.testing.assert_array_equal(timeline.busy, [10, 10])
    assert timeline.makespan == 4 * 1 + 3 * 1.5 + 2 * 2.5, "four half F, three half I, both half W where it turns"


def test_a_fused_backward_costs_i_and_w_and_the_previous_stage_waits_for_both():
    timeline = simulate(fuse_backward(one_microbatch()), COSTS)
    assert timeline.makespan == 2 + 2 + 8 + 8


def test_a_w_that_does_not_follow_its_i_cannot_be_fused():
    with pytest.raises(
        UserError, match=r"pipeline\.backward: fused, .*device . of schedule zb-h1 .*microbatch ., chunk 0"
    ):
        fuse_backward(make_table("zb-h1", devices=4, microbatches=8))


def test_the_head_costs_where_the_vocabulary_is_not_sharded():
    head = COSTS.model_copy(update={"head_forward": 1.0, "head_input_gradient": 10.0, "head_weight_gradient": 100.0,
                                    "vocabulary_s": 7.0, "vocabulary_t": 0.5})  # fmt: skip
    np.testing.assert_array_equal(simulate(one_microbatch(), head).busy, [10, 121])
    np.testing.assert_array_equal(simulate(one_microbatch(vocabulary=2), head).busy, [17.5, 17.5])


def test_uneven_stages_have_a_factor_each():
    uneven = COSTS.model_copy(update={"stages": (1.0, 3.0)})
    np.testing.assert_array_equal(simulate(one_microbatch(), uneven).busy, [10, 30])
    with pytest.raises(UserError, match=r"costs\.stages: 2 factors, .*1f1b has 3 stages"):
        simulate(one_microbatch(devices=3), uneven)


@pytest.mark.parametrize(("algorithm", "makespan"), [(1, 2 + 2 + 7 + 11 + 3 + 3 + 5), (2, 2 + 2 + 7 + 3 + 3 + 5 + 11)])
def test_the_last_backward_waits_for_its_barriers(algorithm, makespan):
    """Algorithm 1 waits for T; with 2 the T of 11 comes after the W of the first device."""
    costs = COSTS.model_copy(update={"vocabulary_s": 7.0, "vocabulary_t": 11.0})
    timeline = simulate(one_microbatch(vocabulary=algorithm), costs)
    table = one_microbatch(vocabulary=algorithm)
    last = table.ticks_of(Op.I)[0, 1]
    assert timeline.start[last, 1] == {1: 2 + 2 + 7 + 11, 2: 2 + 2 + 7}[algorithm]
    assert timeline.makespan <= makespan


def test_bytes_between_f_and_i_and_between_i_and_w():
    """One microbatch in flight: all of it until I, then what W needs."""
    table = make_table("zb-h1", devices=2, microbatches=4)
    order = "F0 F1 I0 W0 F2 I1 W1 F3 I2 W2 I3 W3"
    names = [f"{Op(op).name}{k}" for op, k in zip(table.op[:, 0], table.microbatch[:, 0], strict=True) if op]
    assert names == order.split()
    assert stash_bytes(table, input=9, weight=1).tolist() == [20, 11]
    assert stash_bytes(table, weight=10).tolist() == [20, 20]
    assert stash_bytes(table, input=9, weight=1, stash=4).tolist() == [20, 15]


@pytest.mark.parametrize("name", ["1f1b", "zb-h1", "zb-v", "v-half", "v-min", "gpipe"])
def test_pool_bytes_are_those_of_the_lowered_table(name):
    table = make_table(name, devices=4, microbatches=8)
    slots = lower_table(table, repeats=(1,) * table.stages).slots
    for pool in ("input", "weight", "stash"):
        assert pool_bytes(table, **dict.fromkeys(("input", "weight", "stash"), 0.0) | {pool: 3.0}) == 3 * slots[pool]


def test_costs_are_read_from_yaml_and_json(tmp_path):
    (tmp_path / "a.yaml").write_text("forward: 2.5\nstages: [1, 0.5]\n")
    (tmp_path / "b.json").write_text('{"forward": 2.5, "stages": [1, 0.5]}')
    assert read_costs(tmp_path / "a.yaml") == read_costs(tmp_path / "b.json") == Costs(forward=2.5, stages=(1, 0.5))


MISTAKES = {
    "misspelt": ("foward: 1", r"costs\.yaml: foward matches nothing; .* Did you mean forward\?"),
    "negative": ("forward: -1", r"costs\.yaml: forward: -1; .*greater than or equal to 0"),
    "a word": ("stages: [1, two]", r"costs\.yaml: stages\.1: 'two'; .*number"),
    "a list": ("[1, 2]", r"costs\.yaml: list; give a mapping"),
    "no YAML": ("{", r"costs\.yaml: not valid YAML"),
    "twice": ("forward: 1\nforward: 2", r"costs\.yaml: not valid YAML: forward is a duplicate"),
}


@pytest.mark.parametrize(("text", "message"), MISTAKES.values(), ids=MISTAKES)
def test_wrong_costs_name_file_and_key(text, message, tmp_path):
    (tmp_path / "costs.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        read_costs(tmp_path / "costs.yaml")
