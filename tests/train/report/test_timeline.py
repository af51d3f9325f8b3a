"""The report's sections of events and samples."""

import re

from meshwright.train.report.timeline import events_section, samples_section


def event(seconds, name, **fields):
    return {"time": 1.76e9 + seconds, "event": name, **fields}


def test_events_show_their_time_since_the_first_and_their_fields():
    section = events_section([event(0, "start", step=0), event(65.2, "save", step=50, stall_seconds=0.0123)])
    words = re.sub(r"<[^>]*>", " ", section)
    assert re.search(r"\+0:00 \s*start", words) and re.search(r"\+1:05 \s*save .*step\s+50 .*stall\s+12 ms", words)


def test_a_long_event_log_lists_its_newest_events_and_counts_the_rest():
    section = events_section([event(0, "start")] + [event(n, "commit", step=n) for n in range(1, 400)])
    assert section.count("<li>") == 300 and "100 earlier events" in section and ">start<" not in section


def test_samples_of_the_newest_step_are_open_and_older_ones_folded():
    section = samples_section([event(n, "sample", step=n, prompt=f"p{n}", text="<t>") for n in (10, 30, 20)])
    assert re.findall(r"p(\d+)", section) == ["30", "20", "10"]
    assert "p30" in section.partition("<details>")[0] and section.count("<details>") == 2 and "&lt;t&gt;" in section


def test_a_run_without_samples_has_no_section_for_them():
    assert samples_section([event(0, "start")]) is None
