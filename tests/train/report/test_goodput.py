"""Goodput of event logs written by hand: every second has one cause, and lost steps are not productive."""

import json

import pytest

from meshwright.train.report.goodput import compute_goodput, daly
from meshwright.train.report.run_record import read_record


def goodput_of(directory, *events):
    lines = [json.dumps({"time": time, "event": name, **fields}) for time, name, fields in events]
    (directory / "events.jsonl").write_text("\n".join(lines) + "\n")
    (directory / "metrics.jsonl").write_text('{"step": 1, "step_seconds": 2.0}\n{"step": 2, "step_seconds": 2.0}\n')
    return compute_goodput(read_record(directory))


FIRST = [
    (100.0, "start", {"step": 0, "startup_seconds": 10.0}),
    (120.0, "compile", {"seconds": 20.0}),
    (141.0, "save", {"step": 10, "stall_seconds": 1.0}),
    (143.0, "commit", {"step": 10}),
    (150.0, "evaluation", {"step": 14, "seconds": 3.0}),
]


def test_an_undisturbed_run_spends_the_rest_on_steps(tmp_path):
    goodput = goodput_of(tmp_path, *FIRST, (162.0, "finish", {"step": 20}))
    assert goodput.badput == {
        **dict.fromkeys(goodput.badput, 0.0),
        "startup": 10,
        "compile": 20,
        "save": 1,
        "evaluate": 3,
    }
    assert (goodput.productive, goodput.wall, goodput.failures) == (38.0, 72.0, 0) and goodput.interval is None


KILLED = (165.0, "restart", {"detect_seconds": 5.0, "step": 17, "suspect": 1})
SECOND = [
    (190.0, "restore", {"step": 10, "startup_seconds": 8.0, "restore_seconds": 2.0}),
    (195.0, "compile", {"seconds": 5.0}),
    (215.0, "finish", {"step": 20}),
]


def test_steps_that_are_computed_again_were_wasted_the_first_time(tmp_path):
    """Saved at 141, killed at 160, 3 s of evaluation in between: 16 s of steps are lost."""
    goodput = goodput_of(tmp_path, *FIRST, KILLED, *SECOND)
    assert goodput.badput == {
        "startup": 18, "restore": 2, "compile": 25, "save": 1, "evaluate": 3, "wasted": 16, "detect": 5, "restart": 15,
        "wait": 0,
    }  # fmt: skip
    assert (goodput.productive, goodput.wall, goodput.failures) == (20.0 + 20.0, 125.0, 1)


def test_waiting_for_a_host_before_a_shrink_is_a_cause_of_its_own(tmp_path):
    shrunk = (176.0, "shrink", {"processes": 2, "waited_seconds": 10.0})
    goodput = goodput_of(tmp_path, *FIRST, KILLED, shrunk, *SECOND)
    assert (goodput.badput["wait"], goodput.badput["restart"], goodput.badput["wasted"]) == (10, 5, 16)


def test_a_session_that_is_lost_before_its_first_save_is_all_wasted(tmp_path):
    events = [FIRST[0], FIRST[1], (150.0, "restart", {"detect_seconds": 2.0}), (160.0, "start", {"step": 0}),
              (180.0, "finish", {"step": 20})]  # fmt: skip
    goodput = goodput_of(tmp_path, *events)
    assert (goodput.badput["wasted"], goodput.productive, goodput.badput["restart"]) == (28.0, 20.0, 10.0)


def test_a_damaged_checkpoint_makes_an_earlier_session_wasted(tmp_path):
    """The third session continues from step 0: nothing of the first two is preserved."""
    third = [(230.0, "restart", {}), (231.0, "quarantine", {"step": 10}), (240.0, "start", {"step": 0}),
             (250.0, "finish", {"step": 20})]  # fmt: skip
    goodput = goodput_of(tmp_path, *FIRST, KILLED, *SECOND[:2], *third)
    assert goodput.productive == 10.0 and goodput.badput["wasted"] == 36.0 + 35.0


def test_time_between_sessions_after_a_preemption_does_not_count(tmp_path):
    later = [(event[0] + 1000.0, *event[1:]) for event in SECOND]
    goodput = goodput_of(tmp_path, *FIRST, (162.0, "preempted", {"step": 10}), *later)
    assert goodput.wall == 72.0 + 35.0 and goodput.badput["restart"] == 0.0


@pytest.mark.parametrize(("stall", "seconds"), [(1.0, 149), (10.0, 472), (60.0, 1156)])
def test_without_recovery_dalys_interval_is_youngs_less_the_stall(stall, seconds):
    """T = sqrt(2 C M) at 3.09 hours between failures."""
    assert daly(stall=stall, failure=3.09 * 3600, recovery=0.0) == pytest.approx(seconds - stall, abs=1)


def test_the_best_interval_costs_less_than_its_neighbours():
    """Each interval costs a stall, and each failure half an interval."""

    def cost(interval, stall=5.0, failure=4000.0):
        return stall / interval + (interval / 2 + stall) / failure

    best = daly(stall=5.0, failure=4000.0, recovery=0.0) + 5.0
    assert cost(best) < min(cost(0.8 * best), cost(1.25 * best))
