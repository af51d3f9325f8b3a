"""Events and samples in the order a reader wants them."""

import re

from meshwright.train.report.timeline import events_section, samples_section


def event(at, name, **fields):
    return {"time": 1.76e9 + at, "event": name, **fields}


def test_events_tell_their_time_since_the_first_and_their_fields():
    told = events_section([event(0, "start", step=0), event(65.2, "save", step=50, stall_seconds=0.0123)])
    words = re.sub(r"<[^>]*>", " ", told)
    assert re.search(r"\+0:00 \s*start", words) and re.search(r"\+1:05 \s*save .*step\s+50 .*stall\s+12 ms", words)


def test_a_long_journal_lists_its_newest_events_and_counts_the_rest():
    told = events_section([event(0, "start")] + [event(n, "commit", step=n) for n in range(1, 400)])
    assert told.count("<li>") == 300 and "100 earlier events" in told and ">start<" not in told


def test_the_newest_samples_stand_open_and_older_ones_are_folded():
    told = samples_section([event(n, "sample", step=n, prompt=f"p{n}", text="<t>") for n in (10, 30, 20)])
    assert re.findall(r"p(\d+)", told) == ["30", "20", "10"]
    assert "p30" in told.partition("<details>")[0] and told.count("<details>") == 2 and "&lt;t&gt;" in told


def test_a_run_without_samples_has_no_section_for_them():
    assert samples_section([event(0, "start")]) is None
