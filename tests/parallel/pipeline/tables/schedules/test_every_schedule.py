"""The battery that every registered schedule passes, for random sizes: discovered, never listed."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.configs.errors import UserError
from meshwright.parallel.pipeline.tables.csv_io import read_csv, write_csv
from meshwright.parallel.pipeline.tables.list_schedule import assign_slots
from meshwright.parallel.pipeline.tables.placement import interleaved, v_shaped
from meshwright.parallel.pipeline.tables.schedules.registry import SCHEDULES, make_table
from meshwright.parallel.pipeline.tables.simulator import in_flight, simulate
from meshwright.parallel.pipeline.tables.table import Op
from meshwright.parallel.pipeline.tables.validate import check_table

GENERATED = [name for name, family in SCHEDULES.items() if "path" not in family.options]
CASES = [(name, algorithm) for name in GENERATED for algorithm in SCHEDULES[name].vocabulary]
every_schedule = pytest.mark.parametrize(("name", "algorithm"), CASES)
quick = settings(max_examples=12, deadline=None)

# Microbatches of a whole device that a schedule promises to hold at most, of p, m, v.
PROMISES = {
    "gpipe": lambda p, m, v: m,
    "1f1b": lambda p, m, v: p,
    "interleaved": lambda p, m, v: p + (p - 1) / v,
    "zb-h1": lambda p, m, v: p,
    "zb-h2": lambda p, m, v: 2 * p - 1,
    "zb-v": lambda p, m, v: p,
    "v-half": lambda p, m, v: (p + 2) // 2,
    "v-min": lambda p, m, v: (p + 4) // 3,
    "auto": lambda p, m, v: 2 * p,
    "interlaced": lambda p, m, v: 1.5 * p,
    "forward-only": lambda p, m, v: 1 / v,
}
BARRIERS = {0: 0, 1: 2, 2: 1}


@st.composite
def sizes_of(draw, name):
    """Arguments of `make_table` that the schedule takes."""
    family = SCHEDULES[name]
    devices = draw(st.integers(1, 7))
    fewest, most = family.chunks
    chunks = draw(st.integers(fewest, most or 4))
    microbatches = draw(st.integers(1, 3)) * devices if name == "interleaved" else draw(st.integers(1, 17))
    sizes = {"devices": devices, "microbatches": microbatches, "chunks": chunks}
    if "memory_limit" in family.options:
        sizes["memory_limit"] = draw(st.none() | st.integers(1, 2 * devices))
    if "placement" in family.options:
        interleaved_sizes = {"placement": interleaved(devices, chunks=chunks + 1), "chunks": chunks + 1}
        sizes |= draw(st.sampled_from([{}, {"placement": v_shaped(devices), "chunks": 2}, interleaved_sizes]))
    return sizes


@every_schedule
@quick
@given(data=st.data())
def test_every_pass_happens_once_and_after_what_it_needs(name, algorithm, data):
    """Checks the rules in the docstring of `table.py` itself, not by the validator."""
    sizes = data.draw(sizes_of(name))
    table = make_table(name, vocabulary=algorithm, **sizes)
    p, m, stages = sizes["devices"], range(sizes["microbatches"]), range(table.stages)
    at = {op: table.ticks_of(op) for op in Op}
    trains = SCHEDULES[name].trains
    for op in (Op.F, Op.I, Op.W):
        assert at[op].keys() == (set(itertools.product(m, stages)) if trains or op is Op.F else set())
    for op in (Op.S, Op.T):
        assert at[op].keys() == (set(itertools.product(m, range(p))) if algorithm and (trains or op is Op.S) else set())
    for k, s in at[Op.F]:
        assert s == 0 or at[Op.F][k, s - 1] < at[Op.F][k, s]
    for k, s in at[Op.I]:
        behind = at[Op.I][k, s + 1] if s + 1 < table.stages else 0
        assert max(at[Op.F][k, s], behind) < at[Op.I][k, s] < at[Op.W][k, s]
    for (k, _), tick in at[Op.S].items():
        assert at[Op.F][k, table.stages - 1] < tick
    for (k, _), tick in at[Op.T].items():
        assert max(at[Op.S][k, device] for device in range(p)) < tick
    barrier = at[{0: Op.IDLE, 1: Op.T, 2: Op.S}[algorithm]] if trains and algorithm else {}
    assert all(tick < at[Op.I][k, table.stages - 1] for (k, _), tick in barrier.items())


@every_schedule
@quick
@given(data=st.data())
def test_no_device_holds_more_than_the_schedule_promises(name, algorithm, data):
    sizes = data.draw(sizes_of(name))
    table = make_table(name, vocabulary=algorithm, **sizes)
    p, m, v = table.devices, table.microbatches, table.chunks
    more = BARRIERS[algorithm] if SCHEDULES[name].trains and name != "interlaced" else 0
    limit = sizes.get("memory_limit") or PROMISES[name](p, m, v) + more
    assert in_flight(table).max() <= limit
    assert (table.slots == in_flight(table) * v).all(), "the pool is as small as it can be"


@every_schedule
@quick
@given(data=st.data())
def test_with_unit_costs_both_clocks_count_ticks(name, algorithm, data):
    """The tables are as tight as their orders allow: with unit costs the asynchronous clock gains nothing."""
    table = make_table(name, vocabulary=algorithm, **data.draw(sizes_of(name)))
    timeline = simulate(table)
    assert timeline.makespan * table.chunks == pytest.approx(table.ticks)
    assert timeline.lockstep == pytest.approx(timeline.makespan)


@every_schedule
def test_a_table_survives_csv(name, algorithm, tmp_path):
    table = make_table(name, devices=3, microbatches=6, vocabulary=algorithm)
    write_csv(table, tmp_path / "table.csv")
    again = read_csv(tmp_path / "table.csv")
    assert again.equals(table)
    sizes = {"devices": 3, "microbatches": 6, "vocabulary": algorithm, "path": tmp_path / "table.csv"}
    assert make_table("file", **sizes).equals(table)


@every_schedule
def test_a_table_without_its_last_tick_is_refused(name, algorithm):
    table = make_table(name, devices=2, microbatches=4, vocabulary=algorithm)
    for array, nothing in ((table.op, Op.IDLE), (table.microbatch, -1), (table.chunk, -1), (table.slot, -1)):
        array[-1] = nothing
    with pytest.raises(UserError, match=r"schedule .*: device \d never does .*\(microbatch \d, (stage|device) \d\)"):
        check_table(table)


def test_slots_of_a_table_are_those_of_interval_coloring():
    table = make_table("v-half", devices=4, microbatches=8)
    assert (assign_slots(table.op, table.microbatch, table.chunk) == table.slot).all()


def test_every_schedule_has_a_promise():
    assert set(PROMISES) == set(GENERATED)


REFUSED = {
    "no such schedule": ({"name": "1f2b"}, r"pipeline.schedule: 1f2b matches nothing.*Did you mean 1f1b\?"),
    "no device": ({"devices": 0}, "pipeline stages: 0 devices"),
    "no microbatch": ({"microbatches": 0}, "microbatches: 0; .*4 or more"),
    "chunks of a V": ({"name": "zb-v", "chunks": 3}, "pipeline.chunks: 3, .*zb-v takes exactly 2"),
    "one chunk interleaved": (
        {"name": "interleaved", "chunks": 1},
        "pipeline.chunks: 1, .*interleaved takes 2 or more",
    ),
    "groups": ({"name": "interleaved", "microbatches": 6}, "microbatches: 6; .*groups of 4.*use 4 or 8"),
    "vocabulary": ({"name": "zb-v", "vocabulary": 2}, "vocab_parallel: 2, .*zb-v takes 0; .*1f1b or v-half"),
    "algorithm": ({"vocabulary": 3}, "vocab_parallel: 3, .*1f1b takes 0 or 1 or 2"),
    "limit": ({"memory_limit": 3}, "memory_limit: 3, .*1f1b does not take it.* auto"),
    "limit below one": ({"name": "auto", "memory_limit": 0.5}, "memory_limit: 0.5 microbatches.*1f1b holds 4"),
    "no path": ({"name": "file"}, "pipeline.path: None"),
}


@pytest.mark.parametrize(("changed", "message"), REFUSED.values(), ids=REFUSED)
def test_options_that_a_schedule_does_not_take_are_refused_with_a_remedy(changed, message):
    sizes = {"name": "1f1b", "devices": 4, "microbatches": 8} | changed
    with pytest.raises(UserError, match=message):
        make_table(sizes.pop("name"), **sizes)


def test_a_file_for_another_number_of_devices_is_refused(tmp_path):
    write_csv(make_table("1f1b", devices=2, microbatches=4), tmp_path / "two.csv")
    with pytest.raises(UserError, match=r"two\.csv: devices: 2, but the run has 4"):
        make_table("file", devices=4, microbatches=4, path=tmp_path / "two.csv")
