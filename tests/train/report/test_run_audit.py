"""The audit finds every kind of breach, in sample logs and event logs written by hand."""

import json
import re

import numpy as np
import pytest

from meshwright.configs.errors import UserError
from meshwright.train.core.sample_log import SampleLog, row_fingerprint
from meshwright.train.report.run_audit import audit

SIZE = 4  # global batch


def row(sample):
    return {"tokens": np.full((1, 3), sample, np.int32), "targets": np.full((1, 3), sample + 1, np.int32)}


def write_epoch(directory, *, epoch, start, steps, processes=2):
    """Write an epoch that starts from `start` and does `steps`."""
    share = SIZE // processes
    for process in range(processes):
        ledger = SampleLog(directory, epoch=epoch, process=process, processes=processes, enabled=True)
        ledger.record_start(start)
        for step in steps:
            first = (step - 1) * SIZE + process * share
            rows = [row(first + offset) for offset in range(share)]
            ledger.record_rows(
                step, {key: np.concatenate([row_fields[key] for row_fields in rows]) for key in rows[0]}, first=first
            )
            ledger.record_update(step)


def write_events(directory, *events):
    lines = [
        json.dumps({"time": float(number), "event": name, "step": step}) for number, (name, step) in enumerate(events)
    ]
    (directory / "events.jsonl").write_text("\n".join(lines) + "\n")


@pytest.fixture
def run(tmp_path):
    """Steps 1 to 5, of which those after 3 are lost; then half the processes do steps 4 to 8."""
    (tmp_path / "config.yaml").write_text(f"data: {{global_batch: {SIZE}}}")
    write_epoch(tmp_path, epoch=1, start=0, steps=range(1, 6))
    write_epoch(tmp_path, epoch=2, start=3, steps=range(4, 9), processes=1)
    write_events(tmp_path, ("start", 0), ("commit", 3), ("restart", 5), ("restore", 3), ("commit", 6), ("commit", 8))
    return tmp_path


def breaches(directory):
    return {one.promise: one.detail for one in audit(directory) if not one.passed}


def test_a_run_that_shrank_and_repeated_lost_steps_kept_its_promises(run):
    assert not breaches(run)


def edit(directory, process, change):
    """Rewrite the sample log of a process."""
    file = directory / "ledger" / f"{process}.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    file.write_text("\n".join(json.dumps(line) for line in change(lines)) + "\n")


def drop_step(step, epoch):
    return lambda lines: [line for line in lines if (line.get("step"), line["epoch"]) != (step, epoch)]


def replace_row(lines):
    return [
        {**line, "rows": ["other", *line["rows"][1:]]} if line.get("step") == 4 and line["epoch"] == 2 else line
        for line in lines
    ]


def shift_samples(lines):
    return [{**line, "first": line["first"] - 2} if line.get("step") == 2 else line for line in lines]


ORDER, ONCE = "no step was left out or repeated", "every sample was consumed once"
BREACHES = {
    "a step left out": (0, drop_step(5, 2), ORDER, "process 0 did step 6 after 4"),
    "a step done twice": (0, lambda lines: [*lines, lines[-1]], ORDER, "did step 8 after 8"),
    "a share of a step is missing": (1, drop_step(2, 1), ONCE, r"step 2: samples \[6, 7\]"),
    "samples of another share": (1, shift_samples, ONCE, r"step 2: samples"),
    "another row under its number": (0, replace_row, ONCE, "sample 12 had another"),
    "an older epoch": (0, lambda lines: [*lines, {"epoch": 1, "from": 5}], "one epoch at a time", "epoch 1 after 2"),
}  # fmt: skip


@pytest.mark.parametrize(("process", "change", "promise", "detail"), BREACHES.values(), ids=BREACHES)
def test_a_breach_in_the_sample_log_is_named(run, process, change, promise, detail):
    edit(run, process, change)
    assert re.search(detail, breaches(run)[promise])


HISTORIES = {
    "lost": ([("commit", 3), ("commit", 6), ("restore", 3)], "no committed step was lost"),
    "from scratch": ([("commit", 3), ("start", 0)], "no committed step was lost"),
    "twice": ([("commit", 3), ("restore", 3), ("commit", 3)], "no step was committed twice"),
}


@pytest.mark.parametrize(("events", "promise"), HISTORIES.values(), ids=HISTORIES)
def test_a_breach_in_the_event_log_is_named(run, events, promise):
    write_events(run, *events)
    assert list(breaches(run)) == [promise]


def test_a_restart_may_be_from_before_a_quarantined_checkpoint(run):
    write_events(run, ("commit", 3), ("commit", 6), ("quarantine", 6), ("restore", 3), ("commit", 6))
    assert not breaches(run)


ISLAND = f"data: {{global_batch: {SIZE}}}\nouter: {{name: diloco, every: 3}}\nislands: {{count: 2, number: 1}}"


def write_island_steps(ledger, steps, *, number=1):
    """Write steps of an island, which consumes its half of every global batch."""
    for step in steps:
        first = (step - 1) * SIZE + number * SIZE // 2
        rows = [row(first + offset) for offset in range(SIZE // 2)]
        ledger.record_rows(
            step, {key: np.concatenate([row_fields[key] for row_fields in rows]) for key in rows[0]}, first=first
        )
        ledger.record_update(step)


@pytest.fixture
def island(tmp_path):
    """Island 1 of 2: steps 1 to 4, then another island's state at step 6; restored at 8, while the others were at 7."""
    (tmp_path / "config.yaml").write_text(ISLAND)
    for epoch, starts in ((1, {0: range(1, 5), 6: range(7, 10)}), (2, {7: range(8, 10)})):
        ledger = SampleLog(tmp_path, epoch=epoch, process=0, processes=1, enabled=True)
        for start, steps in starts.items():
            ledger.record_start(start)
            write_island_steps(ledger, steps)
    write_events(tmp_path, *ISLAND_EVENTS)
    return tmp_path


ISLAND_EVENTS = [
    ("start", 0), ("commit", 3), ("bootstrap", 6), ("commit", 8), ("restart", 9),
    ("restore", 8), ("bootstrap", 7), ("quarantine", 8), ("commit", 7), ("commit", 8),
]  # fmt: skip


def test_an_island_consumes_its_own_samples_and_may_copy_steps_of_others(island):
    assert not breaches(island)


def test_a_missing_step_that_was_not_copied_is_a_breach(island):
    write_events(island, *(one for one in ISLAND_EVENTS if one != ("bootstrap", 6)))
    assert breaches(island) == {ONCE: "step 5 is missing"}


def test_another_islands_samples_are_foreign(island):
    edit(island, 0, lambda lines: [{**line, "first": line["first"] - 2} if "first" in line else line for line in lines])
    assert re.search(r"step 1: samples", breaches(island)[ONCE])


def test_a_commit_after_a_copy_may_not_be_lost(island):
    write_events(island, *ISLAND_EVENTS[:-1], ("restore", 3))
    assert breaches(island) == {"no committed step was lost": "step 7 was committed, and the run continued from 3"}


def test_a_run_without_a_sample_log_cannot_be_audited(tmp_path):
    (tmp_path / "config.yaml").write_text("{}")
    with pytest.raises(UserError, match=r"train with logging\.ledger=true"):
        audit(tmp_path)


def test_a_rows_fingerprint_depends_on_tokens_and_targets():
    assert len({row_fingerprint(*pair) for pair in (np.eye(2, dtype=np.int32), np.eye(2, dtype=np.int32)[::-1])}) == 2
