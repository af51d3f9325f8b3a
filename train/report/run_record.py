"""The files of a run directory, read into memory. A run that was killed early lacks some; the record names them."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..core.event_log import read_events, read_metrics

# File -> what the report lacks without it.
FILES = {
    "config.yaml": "the configuration",
    "environment.json": "versions, devices and the corpus",
    "plan.json": "memory, communication and sharding; it is written once the step is compiled",
    "metrics.jsonl": "loss and throughput; the first line is written after the first logged step",
    "events.jsonl": "events with their times",
}

SESSION_STARTS = ("start", "restore")  # events with which a session begins


@dataclass(frozen=True)
class Record:
    """The content of a run's files. Fields of a missing file are empty, and the file is in `missing`."""

    name: str
    config: dict[str, Any]
    config_text: str
    environment: dict[str, Any]
    plan: dict[str, Any]
    pipeline: dict[str, Any]  # measured ops; {} for a run without a pipeline
    detection: dict[str, Any]  # what the launcher observed of the processes; {} without a launcher
    metrics: list[dict[str, float]]  # a row for each logged step, in order
    events: list[dict[str, Any]]  # oldest first
    missing: dict[str, str]  # file -> why it could not be read

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """(steps, values) of one metric at the steps that have it; values that are not finite are NaN."""
        rows = [row for row in self.metrics if name in row]
        values = [row[name] if math.isfinite(row[name]) else math.nan for row in rows]
        return [int(row["step"]) for row in rows], values

    def latest(self, name: str) -> float | None:
        """The newest value of a metric; None if it was never logged."""
        return next((row[name] for row in reversed(self.metrics) if name in row), None)

    def median(self, name: str) -> float | None:
        """The median of a metric without the first row, which is slow; None if it was never logged."""
        values = sorted(row[name] for row in self.metrics[1:] or self.metrics if name in row)
        return values[len(values) // 2] if values else None

    def events_named(self, *names: str) -> list[dict[str, Any]]:
        """The events of these names, oldest first."""
        return [event for event in self.events if event["event"] in names]

    @property
    def status(self) -> str:
        """How the last session ended: finished, failed, preempted, or unfinished (running or killed)."""
        names = {"finish": "finished", "failure": "failed", "give-up": "failed", "preempted": "preempted"}
        ends = [event["event"] for event in self.events if event["event"] in names or event["event"] in SESSION_STARTS]
        return names.get(ends[-1], "unfinished") if ends else "unfinished"

    @property
    def seconds(self) -> float:
        """The length of all sessions, each from its first event to its last."""
        return sum(session[-1]["time"] - session[0]["time"] for session in self.sessions())

    def sessions(self) -> Iterator[list[dict[str, Any]]]:
        """Yield the events of each session."""
        session: list[dict[str, Any]] = []
        for event in self.events:
            if event["event"] in SESSION_STARTS and session:
                yield session
                session = []
            session.append(event)
        if session:
            yield session


def read_record(directory: Path) -> Record:
    """Read the run in `directory`."""
    missing: dict[str, str] = {}
    events = [event for event in read_events(directory) if "event" in event and "time" in event]
    metrics = read_metrics(directory)
    for file, rows in (("metrics.jsonl", metrics), ("events.jsonl", events)):
        if not rows:
            missing[file] = "is empty" if (directory / file).exists() else "is not there"
    text = read_text(directory / "config.yaml", missing)
    return Record(
        name=directory.resolve().name,
        config=parse_mapping(text, "config.yaml", missing),
        config_text=text,
        environment=parse_mapping(read_text(directory / "environment.json", missing), "environment.json", missing),
        plan=parse_mapping(read_text(directory / "plan.json", missing), "plan.json", missing),
        # Only finished runs with a pipeline have this file, and only launched runs the next: they are not `missing`.
        pipeline=parse_mapping(read_text(directory / "pipeline.json", {}), "pipeline.json", missing),
        detection=parse_mapping(read_text(directory / "detection.json", {}), "detection.json", missing),
        metrics=metrics,
        events=events,
        missing=missing,
    )


def read_text(file: Path, missing: dict[str, str]) -> str:
    """The text of `file`; if it cannot be read, "" and an entry in `missing`."""
    try:
        return file.read_text(encoding="utf-8")
    except FileNotFoundError:
        missing[file.name] = "is not there"
    except (OSError, UnicodeDecodeError) as error:
        missing[file.name] = f"cannot be read: {error}"
    return ""


def parse_mapping(text: str, name: str, missing: dict[str, str]) -> dict[str, Any]:
    """The mapping in the JSON or YAML `text`; if it is none, {} and an entry in `missing`."""
    try:
        tree = json.loads(text or "{}") if name.endswith(".json") else yaml.safe_load(text) or {}
    except (ValueError, yaml.YAMLError) as error:
        missing[name] = f"cannot be understood: {error}"
        return {}
    if not isinstance(tree, dict):
        missing[name] = "is not a mapping"
        return {}
    return tree
