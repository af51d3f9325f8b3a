"""The report is one HTML file, shows all files of a run, and names the missing ones."""

import json
import re
from html.parser import HTMLParser

import pytest

from meshwright.train.report.html import write_report
from meshwright.train.report.run_record import FILES, read_record

VOID = {"meta", "br", "line", "rect", "circle", "path", "use"}


class Page(HTMLParser):
    """Checks that elements nest, and collects the words, the attributes and the titles of sections."""

    def __init__(self, text):
        super().__init__()
        self.open, self.words, self.attributes, self.titles = [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.attributes += attrs

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open and self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data):
        if self.open and self.open[-1] == "h2":
            self.titles.append(data)
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self):
        return re.sub(r"\s+", " ", " ".join(self.words))


def page(directory):
    return Page(write_report(directory).read_text(encoding="utf-8"))


def test_a_finished_run_shows_every_part(finished):
    report = page(finished)
    assert report.open == []
    assert report.titles == [
        "Curves", "Memory of one device", "Communication", "Mesh", "Sharding", "Samples", "Goodput", "Events",
        "Environment", "Configuration",
    ]  # fmt: skip
    for text in ("gzip -9: 2.103", "9d1c6f20b7a4e835", "jax 0.10.2", "in 2 sessions", "data 2 × fsdp 2 × tensor 2"):
        assert text in report.text, text


def test_the_report_refers_to_no_other_file_or_address(finished):
    text = write_report(finished).read_text()
    assert not re.search(r"https?:|//[a-z]|@import|url\((?!#)|<script|<link|<img|<iframe", text)
    references = {value for name, value in Page(text).attributes if name in ("href", "src")}
    assert references and all(reference.startswith("#") for reference in references)


def test_ids_are_unique_in_the_page(finished):
    """Clip paths and markers are looked up by id in the whole page: the first one of an id wins."""
    names = [value for name, value in page(finished).attributes if name == "id"]
    assert names and len(names) == len(set(names))


def test_pictures_follow_the_page_into_dark_mode(finished):
    text = write_report(finished).read_text()
    pictures = "".join(re.findall(r"<svg.*?</svg>", text, flags=re.S))
    assert pictures.count("<svg") == 10 and not re.search(r"#[0-9a-f]{6}\b", pictures)
    used, light = set(re.findall(r"var\(--([\w-]+)\)", text)), re.search(r":root \{(.*?)\n\}", text, re.S)[1]
    dark = re.search(r"prefers-color-scheme: dark\) \{(.*?)\n\}", text, re.S)[1]
    assert used - {"tone", "tint"} <= set(re.findall(r"--([\w-]+):", light)) & set(re.findall(r"--([\w-]+):", dark))


@pytest.mark.parametrize("file", FILES)
def test_a_missing_file_is_named_and_the_rest_is_shown(finished, file):
    (finished / file).unlink()
    report = page(finished)
    assert report.open == [] and f"{file} is not there" in report.text
    assert len(report.titles) >= 4


@pytest.mark.parametrize("file", FILES)
def test_a_damaged_file_is_named_and_the_rest_is_shown(finished, file):
    (finished / file).write_bytes(b'{"step": [')
    assert file in read_record(finished).missing
    assert len(page(finished).titles) >= 4


def test_an_empty_directory_has_a_report(tmp_path):
    report = page(tmp_path)
    assert report.titles == ["Events"] and "unfinished" in report.text and all(file in report.text for file in FILES)


def test_every_text_of_a_run_is_escaped(finished):
    """Every text that a run can put into its report, from its name to the kind of a device."""
    hostile = "<script>alert('1')</script>&\"><b"
    run = finished.rename(finished.with_name("<script>"))
    lines = [
        {"event": "sample", "step": 300, "prompt": hostile, "text": hostile},
        {"event": "failure", "error": hostile, "message": hostile, hostile: hostile},
        {"event": hostile},
    ]
    with (run / "events.jsonl").open("a") as file:
        file.writelines(json.dumps({"time": 1.77e9, **line}) + "\n" for line in lines)
    diagnosis = {"time": 1.0, "step": 1, "kind": hostile, "communication": True, "suspects": [], "evidence": hostile}
    (run / "detection.json").write_text(json.dumps({"diagnoses": [diagnosis]}))
    (run / "config.yaml").write_text(f"steps: {json.dumps(hostile)}\nmodel: {{family: {json.dumps(hostile)}}}\n")
    environment = json.loads((run / "environment.json").read_text())
    environment |= {"versions": {hostile: hostile}, "python": hostile, "tokenizer": {"fingerprint": hostile}}
    (run / "environment.json").write_text(json.dumps(environment))
    plan = json.loads((run / "plan.json").read_text())
    plan["devices"][0] = {"id": hostile, "kind": hostile, "process": 0}
    plan["arrays"].append({"name": f"params/{hostile}", "shape": [2], "dtype": hostile, "bytes_per_device": 8})
    plan["collectives"][hostile] = {hostile: 1e6}
    (run / "plan.json").write_text(json.dumps(plan))
    text = write_report(run).read_text()
    assert "<script" not in text and text.count("&lt;script&gt;") > 20
    assert Page(text).open == [] and Page(text).text.count(hostile) > 15


def test_a_damaged_file_that_only_some_runs_have_is_named(finished):
    (finished / "pipeline.json").write_text("{")
    assert "pipeline.json cannot be understood" in page(finished).text


@pytest.mark.parametrize(
    "ending, status",
    [("finish", "finished"), ("failure", "failed"), ("preempted", "preempted"), ("start", "unfinished")],
)
def test_status_is_that_of_the_last_session(finished, ending, status):
    with (finished / "events.jsonl").open("a") as file:
        file.write(json.dumps({"time": 1.77e9, "event": "restore", "step": 200}) + "\n")
        file.write(json.dumps({"time": 1.77e9, "event": ending}) + "\n")
    assert read_record(finished).status == status


def test_time_between_sessions_is_not_counted(finished):
    assert read_record(finished).seconds == pytest.approx(183.0 + 140.5)


def test_a_loss_that_is_not_a_number_breaks_the_curve_only(finished):
    rows = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": "NaN"}, {"step": 3, "loss": "Infinity"}]
    (finished / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    steps, values = read_record(finished).series("loss")
    assert steps == [1, 2, 3] and values[0] == 3.0 and all(value != value for value in values[1:])
    assert "Loss" in page(finished).text
