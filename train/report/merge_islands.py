"""Merges the files of all islands, runs/NAME/island-*, into runs/NAME, where every report reads them.

metrics.jsonl     a row for each step: mean losses weighted by tokens, sums of tokens and bytes, seconds of the slowest
events.jsonl      the events of all islands in order of time, each with the number of its island
summary.json      for each island its last step and loss, bytes sent and predicted, and counts of failures
"""

import math
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

from ..core import jsonl
from ..core.event_log import EVENTS_FILE, METRICS, read_events, read_metrics
from .html import write_report

SUMS = ("tokens", "tokens_per_second", "sent_bytes", "predicted_sent_bytes", "bootstrap_bytes")
LARGEST = ("step_seconds", "host_seconds", "skipped", "peak_step_bytes", "peak_bytes_per_second")
TRAFFIC = ("sent_bytes", "predicted_sent_bytes", "peak_step_bytes", "peak_bytes_per_second", "bootstrap_bytes")
TROUBLE = ("restart", "bootstrap", "behind", "excluded", "meeting-skipped", "failure")


def merge_islands(directory: Path) -> dict[str, Any]:
    """Write the merged files of `directory` and return the summary. Islands without an event log are left out."""
    islands = {
        int(island.name.removeprefix("island-")): island
        for island in directory.glob("island-*")
        if island.is_dir() and (island / EVENTS_FILE).exists()
    }
    if not islands:
        return {}
    metrics = {number: read_metrics(island) for number, island in sorted(islands.items())}
    events = {number: read_events(island) for number, island in sorted(islands.items())}
    jsonl.replace_rows(directory / METRICS, merge_metrics(metrics))
    tagged = [{**event, "island": number} for number, rows in events.items() for event in rows]
    jsonl.replace_rows(directory / EVENTS_FILE, sorted(tagged, key=lambda event: event["time"]))
    first = islands[min(islands)]
    for name in ("environment.json", "plan.json"):
        if (first / name).exists():
            shutil.copyfile(first / name, directory / name)
    summary = {"islands": [summarize_island(number, metrics[number], events[number]) for number in metrics]}
    jsonl.replace_rows(directory / "summary.json", [summary])
    write_report(directory)
    return summary


def merge_metrics(metrics: dict[int, list[dict[str, float]]]) -> list[dict[str, float]]:
    """Merge the rows of all islands into one row for each step."""
    steps: dict[int, list[dict[str, float]]] = {}
    for rows in metrics.values():
        for row in rows:
            steps.setdefault(int(row["step"]), []).append(row)
    return [{"step": step, **merge_rows(rows)} for step, rows in sorted(steps.items())]


def merge_rows(rows: list[dict[str, float]]) -> dict[str, float]:
    """Merge the rows of one step."""
    merged = {}
    for name in dict.fromkeys(name for row in rows for name in row if name != "step"):
        values = [row[name] for row in rows if name in row]
        if name in SUMS:
            merged[name] = sum(values)
        elif name in LARGEST:
            merged[name] = max(values)
        else:
            weights = [row.get("tokens", 1.0) for row in rows if name in row]
            total = sum(weights)
            merged[name] = sum(v * w for v, w in zip(values, weights, strict=True)) / total if total else math.nan
    return merged


def summarize_island(number: int, metrics: list[dict[str, float]], events: list[dict[str, Any]]) -> dict[str, Any]:
    """The summary of an island. Bytes sent are those of its last session; predicted ones are those of all its steps."""
    counts = Counter(event["event"] for event in events)
    last = {name: value for row in metrics for name, value in row.items()}
    traffic = next((event for event in reversed(events) if event["event"] == "traffic"), {})
    summary = {"island": number, "finished": counts["finish"] > 0}
    summary |= {name: last[name] for name in ("step", "loss", "held_out_loss") if name in last}
    summary |= {name: traffic[name] for name in TRAFFIC if name in traffic}
    return summary | {name.replace("-", "_"): counts[name] for name in TROUBLE if counts[name]}
