"""The event log as a strip with a tick for each event, a list of events, and the generated samples."""

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from .markup import format_duration, format_number, render

MOST_EVENTS = 300  # listed, the newest ones

TONES = {
    "start": "good", "finish": "good", "commit": "good",
    "enter": "good", "bootstrap": "warn", "excluded": "warn", "behind": "warn", "meeting-skipped": "warn",
    "restore": "warn", "skip": "warn", "preempted": "warn", "restart": "warn",
    "shrink": "warn", "move": "warn", "regroup": "warn", "grow": "good",
    "failure": "bad", "give-up": "bad", "save-failed": "bad", "quarantine": "bad",
}  # fmt: skip


def events_section(events: Sequence[Mapping[str, Any]]) -> Markup:
    """The event log without its samples."""
    events = [event for event in events if event["event"] != "sample"]
    began = events[0]["time"] if events else 0.0
    span = max(events[-1]["time"] - began, 1e-9) if events else 0.0
    rows = [
        {
            "name": event["event"],
            "tone": TONES.get(event["event"], "plain"),
            "offset": offset(event, began),
            "left": 100 * (event["time"] - began) / span,
            "fields": [
                ("took" if key == "seconds" else key.removesuffix("_seconds").replace("_", " "), field_text(key, value))
                for key, value in event.items()
                if key not in ("time", "event")
            ],
        }
        for event in events
    ]
    clock = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(began))
    return render("timeline", events=rows, most=MOST_EVENTS, note=f"Times count from {clock} UTC.")


def offset(event: Mapping[str, Any], began: float) -> str:
    """Time since the first event, as `+1:05`."""
    minutes, seconds = divmod(max(int(event["time"] - began), 0), 60)
    hours, minutes = divmod(minutes, 60)
    return f"+{hours}:{minutes:02}:{seconds:02}" if hours else f"+{minutes}:{seconds:02}"


def field_text(key: str, value: Any) -> str:
    """The text of an event's field."""
    if isinstance(value, float) and key.endswith("seconds"):
        return f"{1000 * value:.0f} ms" if value < 1 else format_duration(value)
    return format_number(value) if isinstance(value, float) and math.isfinite(value) else str(value)


def samples_section(events: Sequence[Mapping[str, Any]]) -> Markup | None:
    """The generated samples: the newest step first, earlier ones folded. None if there are none."""
    steps: dict[int, list[Mapping[str, Any]]] = {}
    for event in events:
        if event["event"] == "sample":
            steps.setdefault(event.get("step", 0), []).append(event)
    return render("samples", steps=sorted(steps.items(), reverse=True)) if steps else None
