"""All that a run directory tells, read into memory; a run killed early lacks some of it, and the record says what."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..core.event_log import read_events, read_metrics

# File -> what the report cannot show without it.
FILES = {
    "config.yaml": "the configuration",
    "environment.json": "versions, devices and the corpus",
    "plan.json": "memory, communication and sharding; it is written once the step is compiled",
    "metrics.jsonl": "loss and throughput; the first line is written after the first logged step",
    "events.jsonl": "what happened and when",
}

# A sitting of the run begins with one of these.
BEGINNINGS = ("start", "restore")


@dataclass(frozen=True)
class Record:
    """A run as its files describe it. What is missing is empty, and its file is in `missing`."""

    name: str
    config: dict[str, Any]
    config_text: str
    environment: dict[str, Any]
    plan: dict[str, Any]
    pipeline: dict[str, Any]  # measured ops; {} where nothing was pipelined
    detection: dict[str, Any]  # what the launcher saw of the processes; {} where none did
    metrics: list[dict[str, float]]  # one a logged step, in order
    events: list[dict[str, Any]]  # oldest first
    missing: dict[str, str]  # file -> why it could not be read

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """(steps, values) of one metric, where it was logged; values that are not finite are NaN."""
        rows = [row for row in self.metrics if name in row]
        values = [row[name] if math.isfinite(row[name]) else math.nan for row in rows]
        return [int(row["step"]) for row in rows], values

    def latest(self, name: str) -> float | None:
        """The newest value of a metric; None where it was never logged."""
        return next((row[name] for row in reversed(self.metrics) if name in row), None)

    def median(self, name: str) -> float | None:
        """The median of a metric without its first row, which is still warming up; None where it was never logged."""
        values = sorted(row[name] for row in self.metrics[1:] or self.metrics if name in row)
        return values[len(values) // 2] if values else None

    def events_named(self, *names: str) -> list[dict[str, Any]]:
        """The events of these names, oldest first."""
        return [event for event in self.events if event["event"] in names]

    @property
    def status(self) -> str:
        """How the last sitting ended: finished, failed, preempted, or unfinished (running, or killed)."""
        names = {"finish": "finished", "failure": "failed", "give-up": "failed", "preempted": "preempted"}
        ends = [event["event"] for event in self.events if event["event"] in names or event["event"] in BEGINNINGS]
        return names.get(ends[-1], "unfinished") if ends else "unfinished"

    @property
    def seconds(self) -> float:
        """Time spent in all sittings, from the first event of each to its last; breaks between them do not count."""
        return sum(sitting[-1]["time"] - sitting[0]["time"] for sitting in self.sessions())

    def sessions(self) -> Iterator[list[dict[str, Any]]]:
        """The events of each sitting."""
        sitting: list[dict[str, Any]] = []
        for event in self.events:
            if event["event"] in BEGINNINGS and sitting:
                yield sitting
                sitting = []
            sitting.append(event)
        if sitting:
            yield sitting


def read_record(directory: Path) -> Record:
    """The run in `directory`, as far as it got."""
    missing: dict[str, str] = {}
    events = [event for event in read_events(directory) if "event" in event and "time" in event]
    metrics = read_metrics(directory)
    for file, rows in (("metrics.jsonl", metrics), ("events.jsonl", events)):
        if not rows:
            missing[file] = "is empty" if (directory / file).exists() else "is not there"
    text = read_text(directory / "config.yaml", missing)
    return Record(
        name=directory.resolve().name,
        config=parsed(text, "config.yaml", missing),
        config_text=text,
        environment=parsed(read_text(directory / "environment.json", missing), "environment.json", missing),
        plan=parsed(read_text(directory / "plan.json", missing), "plan.json", missing),
        # Only a pipelined run that was finished has one: its absence is no loss.
        pipeline=parsed(read_text(directory / "pipeline.json", {}), "pipeline.json", missing),
        detection=parsed(read_text(directory / "detection.json", {}), "detection.json", missing),
        metrics=metrics,
        events=events,
        missing=missing,
    )


def read_text(file: Path, missing: dict[str, str]) -> str:
    """The text of `file`; where there is none, "" and a word in `missing`."""
    try:
        return file.read_text(encoding="utf-8")
    except FileNotFoundError:
        missing[file.name] = "is not there"
    except (OSError, UnicodeDecodeError) as error:
        missing[file.name] = f"cannot be read: {error}"
    return ""


def parsed(text: str, name: str, missing: dict[str, str]) -> dict[str, Any]:
    """The mapping that `text` spells; where it spells none, {} and a word in `missing`."""
    try:
        tree = json.loads(text or "{}") if name.endswith(".json") else yaml.safe_load(text) or {}
    except (ValueError, yaml.YAMLError) as error:
        missing[name] = f"cannot be understood: {error}"
        return {}
    if not isinstance(tree, dict):
        missing[name] = "is not a mapping"
        return {}
    return tree
