"""What happened, in order of time: a strip with a tick for each event, the list of them, and the samples."""

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

from .markup import Html, compact, duration, element, section

MOST_EVENTS = 300  # listed; the newest matter when something went wrong

TONES = {
    "start": "good", "finish": "good", "commit": "good",
    "enter": "good", "bootstrap": "warn", "excluded": "warn", "behind": "warn", "meeting-skipped": "warn",
    "restore": "warn", "skip": "warn", "preempted": "warn", "restart": "warn",
    "shrink": "warn", "move": "warn", "regroup": "warn", "grow": "good",
    "failure": "bad", "give-up": "bad", "save-failed": "bad", "quarantine": "bad",
}  # fmt: skip


def timeline(events: Sequence[Mapping[str, Any]]) -> Html:
    """The journal without its samples."""
    events = [event for event in events if event["event"] != "sample"]
    if not events:
        return section("Events", element("p", "Nothing was journalled.", class_="note"))
    shown, began = events[-MOST_EVENTS:], events[0]["time"]
    earlier = len(events) - len(shown)
    rows = [line(event, began) for event in shown]
    clock = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(began))
    return section(
        "Events",
        strip(events),
        element("p", f"{earlier} earlier events are in events.jsonl.", class_="note") if earlier else None,
        element("ol", *rows, class_="events"),
        note=f"Times count from {clock} UTC.",
    )


def strip(events: Sequence[Mapping[str, Any]]) -> Html:
    """All events on one line, left to right in time."""
    began = events[0]["time"]
    span = max(events[-1]["time"] - began, 1e-9)
    ticks = [
        element(
            "i",
            class_=TONES.get(event["event"], "plain"),
            style=f"left:{100 * (event['time'] - began) / span:.2f}%",
            title=f"{offset(event, began)} {event['event']}",
        )
        for event in events
    ]
    return element("div", *ticks, class_="strip")


def line(event: Mapping[str, Any], began: float) -> Html:
    """One event: when, what, and its fields."""
    fields = [
        element("span", element("em", titled(key)), f" {worded(key, value)}")
        for key, value in event.items()
        if key not in ("time", "event")
    ]
    badge = element("b", event["event"], class_=f"badge {TONES.get(event['event'], 'plain')}")
    return element("li", element("time", offset(event, began)), badge, element("span", *fields, class_="fields"))


def offset(event: Mapping[str, Any], began: float) -> str:
    """`+1:05` since the first event."""
    minutes, seconds = divmod(max(int(event["time"] - began), 0), 60)
    hours, minutes = divmod(minutes, 60)
    return f"+{hours}:{minutes:02}:{seconds:02}" if hours else f"+{minutes}:{seconds:02}"


def titled(key: str) -> str:
    """A field's name as people write it: `stall` for stall_seconds, whose value has its unit."""
    return "took" if key == "seconds" else key.removesuffix("_seconds").replace("_", " ")


def worded(key: str, value: Any) -> str:
    """A field's value as people write it."""
    if isinstance(value, float) and key.endswith("seconds"):
        return f"{1000 * value:.0f} ms" if value < 1 else duration(value)
    return compact(value) if isinstance(value, float) and math.isfinite(value) else str(value)


def samples(events: Sequence[Mapping[str, Any]]) -> Html | None:
    """What the model made of the prompts: the newest first, earlier ones folded away. None where there are none."""
    steps: dict[int, list[Mapping[str, Any]]] = {}
    for event in events:
        if event["event"] == "sample":
            steps.setdefault(event.get("step", 0), []).append(event)
    if not steps:
        return None
    newest, *older = sorted(steps, reverse=True)
    folded = [element("details", element("summary", f"step {step}"), *map(sample, steps[step])) for step in older]
    return section("Samples", *map(sample, steps[newest]), *folded, note=f"After step {newest}.")


def sample(event: Mapping[str, Any]) -> Html:
    """A prompt and what follows it."""
    return element("pre", element("b", event.get("prompt", "")), event.get("text", ""), class_="sample")
