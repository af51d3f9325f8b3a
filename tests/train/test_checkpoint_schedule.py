"""The interval between saves: from the event log, the same on every process, and used."""

import json
from types import SimpleNamespace

import pytest

from meshwright.train.checkpoint_schedule import (
    EXPECTED_SECONDS_TO_FAILURE,
    FIRST_SAVE_STEPS,
    CheckpointSchedule,
    best_interval,
)
from meshwright.train.core.event_log import EventLog
from meshwright.train.report.goodput import daly
from meshwright.train.report.run_record import read_record

ONE_SAVE = [(0.0, "start", {"step": 0}), (10.0, "save", {"step": 20, "stall_seconds": 2.0}),
         (14.0, "commit", {"step": 20, "seconds": 4.0})]  # fmt: skip


def run_directory(directory, *events):
    lines = [json.dumps({"time": time, "event": name, **fields}) for time, name, fields in events]
    (directory / "events.jsonl").write_text("\n".join(lines) + "\n")
    (directory / "metrics.jsonl").write_text('{"step": 1, "step_seconds": 0.5}\n{"step": 2, "step_seconds": 0.5}\n')
    return directory


def test_without_a_save_there_is_no_interval(tmp_path):
    assert best_interval(read_record(run_directory(tmp_path, (0.0, "start", {"step": 0})))) is None


def test_without_failures_one_a_day_is_assumed(tmp_path):
    best = best_interval(read_record(run_directory(tmp_path, *ONE_SAVE)))
    seconds = daly(stall=2.0, failure=EXPECTED_SECONDS_TO_FAILURE + 14.0, recovery=0.0)
    assert best["steps"] == round(seconds / 0.5) and best["interval_seconds"] == pytest.approx(seconds)


@pytest.mark.parametrize(("level", "failures"), [("storage", 1), ("memory", 0)])
def test_a_failure_counts_where_storage_was_needed(tmp_path, level, failures):
    again = [(20.0, "restart", {"detect_seconds": 1.0}), (30.0, "restore", {"step": 20, "level": level}),
             (40.0, "finish", {"step": 40})]  # fmt: skip
    best = best_interval(read_record(run_directory(tmp_path, *ONE_SAVE, *again)))
    assert best["failure_seconds"] == pytest.approx((EXPECTED_SECONDS_TO_FAILURE + 40.0) / (failures + 1))


def test_a_save_waits_until_the_one_before_it_is_written(tmp_path):
    slow = [*ONE_SAVE[:2], (5000.0, "commit", {"step": 20, "seconds": 4990.0})]
    assert best_interval(read_record(run_directory(tmp_path, *slow)))["interval_seconds"] == 4990.0


def test_every_process_uses_the_interval_of_the_first_one(tmp_path):
    sent = []
    first = CheckpointSchedule(
        "auto", run_directory(tmp_path, *ONE_SAVE), EventLog(tmp_path), lambda steps: sent.append(steps) or steps
    )
    first.restart(20)
    other = CheckpointSchedule("auto", tmp_path, SimpleNamespace(enabled=False), lambda steps: sent[0])
    other.restart(20)
    assert first.next_step == other.next_step == 20 + sent[0]
    assert first.should_save(first.next_step) and not first.should_save(first.next_step - 1)
    first.restart(first.next_step)
    assert first.next_step > 20 + sent[0]


def test_a_fixed_interval_saves_at_its_multiples(tmp_path):
    schedule = CheckpointSchedule(5, tmp_path, EventLog(tmp_path), int)
    schedule.restart(0)
    assert [step for step in range(1, 16) if schedule.should_save(step)] == [5, 10, 15]
    assert not CheckpointSchedule(0, tmp_path, EventLog(tmp_path), int).should_save(FIRST_SAVE_STEPS)
