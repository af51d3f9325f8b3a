"""Event log and metrics survive a process killed at any byte."""

import json
import math

import pytest

from meshwright.configs.errors import UserError
from meshwright.train.core.event_log import EventLog, read_events, read_metrics


def test_events_are_read_in_order_with_their_fields(tmp_path):
    event_log = EventLog(tmp_path)
    event_log.record("start", step=0)
    event_log.record("restore", step=100, level="storage", reason="newest whole checkpoint")
    first, second = read_events(tmp_path)
    assert first["event"] == "start" and 0 <= second["time"] - first["time"] < 60
    assert {**second, "time": 0} == {
        "time": 0, "event": "restore", "step": 100, "level": "storage", "reason": "newest whole checkpoint",
    }  # fmt: skip


def test_a_line_torn_at_any_byte_loses_only_that_line(tmp_path):
    event_log = EventLog(tmp_path)
    event_log.record("save", step=1)
    whole = event_log.path.stat().st_size
    event_log.record("commit", step=1)
    content = event_log.path.read_bytes()
    for length in range(whole, len(content)):
        event_log.path.write_bytes(content[:length])
        events = read_events(tmp_path)
        assert [event["event"] for event in events] == (["save", "commit"] if length == len(content) - 1 else ["save"])
        EventLog(tmp_path).record("restore", step=1)
        assert read_events(tmp_path)[:-1] == events, f"{length} bytes"
        assert read_events(tmp_path)[-1]["event"] == "restore"


def test_nan_and_infinity_are_written_as_strict_json(tmp_path):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    EventLog(tmp_path).record("skip", step=3, loss=math.nan, grad_norm=math.inf, parts=[-math.inf])
    row = json.loads((tmp_path / "events.jsonl").read_text(), parse_constant=refuse)
    assert math.isnan(float(row["loss"])) and float(row["grad_norm"]) == math.inf and row["parts"] == ["-Infinity"]


def test_a_disabled_event_log_writes_nothing(tmp_path):
    EventLog(tmp_path, enabled=False).record("start", step=0)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_line_in_the_middle_is_skipped_with_a_warning(tmp_path, caplog):
    (tmp_path / "events.jsonl").write_bytes(b'{"event": "start"}\n\x00\x00{"ev\n{"event": "finish"}\n')
    assert [event["event"] for event in read_events(tmp_path)] == ["start", "finish"]
    assert "events.jsonl, line 2" in caplog.text


def test_an_event_log_that_cannot_be_written_names_file_and_reason(tmp_path):
    with pytest.raises(UserError, match=r"gone/events.jsonl.*No such file"):
        EventLog(tmp_path / "gone").record("start", step=0)


def test_rows_of_one_step_are_merged_in_any_order(tmp_path):
    """An evaluation's row may come before its step's, because metrics are read one step behind."""
    rows = [{"step": 50, "held_out_loss": 4.1}, {"step": 50, "loss": 4.0}, {"step": 10, "loss": "NaN"}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 60, "lo')
    first, second = read_metrics(tmp_path)
    assert first["step"] == 10 and math.isnan(first["loss"])
    assert second == {"step": 50, "held_out_loss": 4.1, "loss": 4.0}


def test_a_run_without_files_has_no_events_and_no_metrics(tmp_path):
    assert read_events(tmp_path) == read_metrics(tmp_path) == []
