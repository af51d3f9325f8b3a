"""The battery that every registered schedule passes, for random sizes: discovered, never listed."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.configs.errors import UserError
from meshwright.parallel.pipeline.tables.csv_io import read_csv, write_csv
from meshwright.parallel.pipeline.tables.list_schedule import coloured
from meshwright.parallel.pipeline.tables.placement import interleaved, v_shaped
from meshwright.parallel.pipeline.tables.schedules.registry import SCHEDULES, make
from meshwright.parallel.pipeline.tables.simulator import in_flight, simulate
from meshwright.parallel.pipeline.tables.table import Op
from meshwright.parallel.pipeline.tables.validate import check

MADE = [name for name, family in SCHEDULES.items() if "path" not in family.options]
CASES = [(name, algorithm) for name in MADE for algorithm in SCHEDULES[name].vocabulary]
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
def sizes(draw, name):
    """Keywords of `make` that the schedule takes."""
    family = SCHEDULES[name]
    devices = draw(st.integers(1, 7))
    fewest, most = family.chunks
    chunks = draw(st.integers(fewest, most or 4))
    microbatches = draw(st.integers(1, 3)) * devices if name == "interleaved" else draw(st.integers(1, 17))
    asked = {"devices": devices, "microbatches": microbatches, "chunks": chunks}
    if "memory_limit" in family.options:
        asked["memory_limit"] = draw(st.none() | st.integers(1, 2 * devices))
    if "placement" in family.options:
        around = {"placement": interleaved(devices, chunks=chunks + 1), "chunks": chunks + 1}
        asked |= draw(st.sampled_from([{}, {"placement": v_shaped(devices), "chunks": 2}, around]))
    return asked


@every_schedule
@quick
@given(data=st.data())
def test_every_pass_once_and_behind_what_it_needs(name, algorithm, data):
    """By the lookups of the table and the sentences of its docstring, not by the validator."""
    asked = data.draw(sizes(name))
    table = make(name, vocabulary=algorithm, **asked)
    p, m, stages = asked["devices"], range(asked["microbatches"]), range(table.stages)
    at = {op: table.when(op) for op in Op}
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
    asked = data.draw(sizes(name))
    table = make(name, vocabulary=algorithm, **asked)
    p, m, v = table.devices, table.microbatches, table.chunks
    more = BARRIERS[algorithm] if SCHEDULES[name].trains and name != "interlaced" else 0
    limit = asked.get("memory_limit") or PROMISES[name](p, m, v) + more
    assert in_flight(table).max() <= limit
    assert (table.slots == in_flight(table) * v).all(), "the pool is as small as it can be"


@every_schedule
@quick
@given(data=st.data())
def test_by_default_a_tick_is_a_tick_on_either_clock(name, algorithm, data):
    """The tables are as tight as their orders allow: with unit costs the asynchronous clock gains nothing."""
    table = make(name, vocabulary=algorithm, **data.draw(sizes(name)))
    timeline = simulate(table)
    assert timeline.makespan * table.chunks == pytest.approx(table.ticks)
    assert timeline.lockstep == pytest.approx(timeline.makespan)


@every_schedule
def test_a_csv_gives_the_same_table_back(name, algorithm, tmp_path):
    table = make(name, devices=3, microbatches=6, vocabulary=algorithm)
    write_csv(table, tmp_path / "table.csv")
    again = read_csv(tmp_path / "table.csv")
    assert again.equals(table)
    asked = {"devices": 3, "microbatches": 6, "vocabulary": algorithm, "path": tmp_path / "table.csv"}
    assert make("file", **asked).equals(table)


@every_schedule
def test_a_table_without_its_last_pass_is_refused(name, algorithm):
    table = make(name, devices=2, microbatches=4, vocabulary=algorithm)
    for array, nothing in ((table.op, Op.IDLE), (table.microbatch, -1), (table.chunk, -1), (table.slot, -1)):
        array[-1] = nothing
    with pytest.raises(UserError, match=r"schedule .*: device \d never does .*\(microbatch \d, (stage|device) \d\)"):
        check(table)


def test_slots_of_a_table_are_its_colouring():
    table = make("v-half", devices=4, microbatches=8)
    assert (coloured(table.op, table.microbatch, table.chunk) == table.slot).all()


def test_every_schedule_has_a_promise():
    assert set(PROMISES) == set(MADE)


REFUSED = {
    "no such schedule": ({"name": "1f2b"}, r"pipeline.schedule: 1f2b matches nothing.*Did you mean 1f1b\?"),
    "no device": ({"devices": 0}, "0 devices; a pipeline has at least 1"),
    "no microbatch": ({"microbatches": 0}, "microbatches: 0; a pipeline is fed at least 1, and 4 or more keep 4"),
    "chunks of a V": ({"name": "zb-v", "chunks": 3}, "pipeline.chunks: zb-v takes exactly 2, not 3"),
    "one chunk interleaved": ({"name": "interleaved", "chunks": 1}, "interleaved takes 2 or more, not 1"),
    "groups": ({"name": "interleaved", "microbatches": 6}, "microbatches: 6; .*groups of 4.*use 4 or 8"),
    "vocabulary": ({"name": "zb-v", "vocabulary": 2}, "vocab_parallel: zb-v takes 0, not 2; 1f1b or v-half would work"),
    "algorithm": ({"vocabulary": 3}, "1f1b takes 0 or 1 or 2, not 3; 1f1b and v-half take 1 and 2"),
    "limit": ({"memory_limit": 3}, "memory_limit: 1f1b takes none; auto would"),
    "limit below one": ({"name": "auto", "memory_limit": 0.5}, "memory_limit: 0.5 microbatches.*1f1b 4"),
    "no path": ({"name": "file"}, "pipeline.path: None; .*say which"),
}


@pytest.mark.parametrize(("changed", "message"), REFUSED.values(), ids=REFUSED)
def test_what_a_schedule_does_not_take_is_refused_with_what_would_do(changed, message):
    asked = {"name": "1f1b", "devices": 4, "microbatches": 8} | changed
    with pytest.raises(UserError, match=message):
        make(asked.pop("name"), **asked)


def test_a_file_for_another_mesh_is_refused(tmp_path):
    write_csv(make("1f1b", devices=2, microbatches=4), tmp_path / "two.csv")
    with pytest.raises(UserError, match=r"two\.csv: a schedule of 2 devices, the run has 4; change one of them"):
        make("file", devices=4, microbatches=4, path=tmp_path / "two.csv")
