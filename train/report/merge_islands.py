"""All islands of a run as one: runs/NAME made of runs/NAME/island-*, in the files that every report reads.

metrics.jsonl     a row a step: losses weighted by tokens, tokens and bytes added up, seconds of the slowest
events.jsonl      everybody's, in order of time, each with its island
summary.json      a line an island: how far, its loss, bytes sent beside the predicted ones, what went wrong
"""

import math
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

from ..core import jsonl
from ..core.event_log import EVENTS, METRICS, read_events, read_metrics
from .html import write_report

SUMS = ("tokens", "tokens_per_second", "sent_bytes", "predicted_sent_bytes", "bootstrap_bytes")
LARGEST = ("step_seconds", "host_seconds", "skipped", "peak_step_bytes", "peak_bytes_per_second")
TROUBLE = ("restart", "bootstrap", "behind", "excluded", "meeting-skipped", "failure")


def merge_islands(directory: Path) -> dict[str, Any]:
    """Write the files of `directory` from its islands'; the summary. One that has not written anything is left out."""
    islands = {
        int(island.name.removeprefix("island-")): island
        for island in directory.glob("island-*")
        if island.is_dir() and (island / EVENTS).exists()
    }
    if not islands:
        return {}
    metrics = {number: read_metrics(island) for number, island in sorted(islands.items())}
    events = {number: read_events(island) for number, island in sorted(islands.items())}
    jsonl.replace_rows(directory / METRICS, together(metrics))
    jsonl.replace_rows(directory / EVENTS, ordered(events))
    first = islands[min(islands)]
    for name in ("environment.json", "plan.json"):
        if (first / name).exists():
            shutil.copyfile(first / name, directory / name)
    found = {"islands": [summary(number, metrics[number], events[number]) for number in metrics]}
    jsonl.replace_rows(directory / "summary.json", [found])
    write_report(directory)
    return found


def together(metrics: dict[int, list[dict[str, float]]]) -> list[dict[str, float]]:
    """A row for every step that an island logged, of all that logged it."""
    steps: dict[int, list[dict[str, float]]] = {}
    for rows in metrics.values():
        for row in rows:
            steps.setdefault(int(row["step"]), []).append(row)
    return [{"step": step, **joined(rows)} for step, rows in sorted(steps.items())]


def joined(rows: list[dict[str, float]]) -> dict[str, float]:
    """One step's rows as one."""
    found = {}
    for name in dict.fromkeys(name for row in rows for name in row if name != "step"):
        values = [row[name] for row in rows if name in row]
        if name in SUMS:
            found[name] = sum(values)
        elif name in LARGEST:
            found[name] = max(values)
        else:
            weights = [row.get("tokens", 1.0) for row in rows if name in row]
            total = sum(weights)
            found[name] = sum(v * w for v, w in zip(values, weights, strict=True)) / total if total else math.nan
    return found


def ordered(events: dict[int, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Everybody's events, each with its island's number, oldest first."""
    every = [{**event, "island": number} for number, own in events.items() for event in own]
    return sorted(every, key=lambda event: event["time"])


def summary(number: int, metrics: list[dict[str, float]], events: list[dict[str, Any]]) -> dict[str, Any]:
    """One island in a line. Bytes are those of its last sitting, which the prediction for all its steps may exceed."""
    counts = Counter(event["event"] for event in events)
    last = {name: value for row in metrics for name, value in row.items()}
    traffic = next((event for event in reversed(events) if event["event"] == "traffic"), {})
    found = {"island": number, "finished": counts["finish"] > 0}
    found |= {name: last[name] for name in ("step", "loss", "held_out_loss") if name in last}
    for name in ("sent_bytes", "predicted_sent_bytes", "peak_step_bytes", "peak_bytes_per_second", "bootstrap_bytes"):
        if name in traffic:
            found[name] = traffic[name]
    return found | {name.replace("-", "_"): counts[name] for name in TROUBLE if counts[name]}
