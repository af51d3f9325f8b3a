"""Heat maps of what the launcher saw (`detection.json`): how long each process works by itself, how good each link is.

In a synchronous step everybody is as slow as the slowest, so step times look alike. Seconds that a process did not wait
tell them apart: a row that is darker than the others is a process the others wait for (MegaScale, NSDI'24).
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from .markup import render

ROW, LABEL, WIDTH = 20, 84, 640  # pixels
MOST_ROWS = 256  # more processes are drawn every second, third, ...


def processes_section(detection: Mapping[str, Any]) -> Markup | None:
    """What was found, then the maps. None where no launcher looked on."""
    heat, links, found = detection.get("heat") or [], detection.get("links"), detection.get("diagnoses") or []
    if not heat and not links and not found:
        return None
    words = [(clock(one["time"]), one["step"], one["kind"], where(one), told(one)) for one in found]
    maps = ([own_time(heat)] if heat else []) + (link_maps(links) if links else [])
    return render("processes", diagnoses=words, maps=maps)


def clock(seconds: float) -> str:
    """Seconds since 1970 as the reader's time of day."""
    return time.strftime("%H:%M:%S", time.localtime(seconds))


def where(diagnosis: Mapping[str, Any]) -> str:
    """Which side of the four syndromes."""
    return "communication" if diagnosis["communication"] else "not communication"


def told(diagnosis: Mapping[str, Any]) -> str:
    """Suspects and evidence."""
    slots = diagnosis.get("slots", diagnosis["suspects"])
    pairs = zip(diagnosis["suspects"], slots, strict=True)
    who = ", ".join(str(one) if one == slot else f"{one} (slot {slot})" for one, slot in pairs)
    return f"process {who}: {diagnosis['evidence']}" if who else diagnosis["evidence"]


def own_time(heat: Sequence[Mapping[str, Any]]) -> Markup:
    """[slot, step]: seconds a step without waiting. The step of a column is its last one.

    With all of its processes a run has them in slots of their numbers; with fewer, rows of slots left out are empty.
    """
    count = max(len(column["own"]) for column in heat)
    rows = [[column["own"][row] if row < len(column["own"]) else None for column in heat] for row in range(count)]
    caption = f"Seconds a step by itself, by slot, steps {heat[0]['step']} to {heat[-1]['step']}"
    most = max((value for row in rows for value in row if value is not None), default=0.0)
    return figure(caption, rows, most=most, words=lambda value: f"{value:.3f} s", side="slot")


def link_maps(links: Mapping[str, Sequence[Sequence[float | None]]]) -> list[Markup]:
    """[from, to]: delay, and seconds for a megabyte, so that dark is bad in both."""
    delay = [[None if value is None else 1e3 * value for value in row] for row in links["delay"]]
    width = [[None if not value else 1e6 / value for value in row] for row in links["bandwidth"]]
    return [
        figure(
            "Delay of a link, from row to column", delay, most=largest(delay), words=lambda v: f"{v:.2f} ms", side=""
        ),
        figure(
            "Bandwidth of a link, dark is slow",
            width,
            most=largest(width),
            words=lambda v: f"{1 / v:.0f} MB/s",
            side="",
        ),
    ]


def largest(rows: Sequence[Sequence[float | None]]) -> float:
    """The greatest number there is."""
    return max((value for row in rows for value in row if value is not None), default=0.0)


def figure(
    caption: str, rows: Sequence[Sequence[float | None]], *, most: float, words: Callable[[float], str], side: str
) -> Markup:
    """A grid of cells, the darker the nearer to `most`; a cell without a number is empty."""
    stride = math.ceil(len(rows) / MOST_ROWS)
    columns = max(len(row) for row in rows)
    cell = min(WIDTH / columns, ROW * 2.2)
    drawn = []
    for number, row in list(enumerate(rows))[::stride]:
        name = f"{side} {number}".strip()
        cells = [
            (
                LABEL + column * cell,
                0.06 + 0.94 * value / most if most > 0 else 0.06,
                f"{name}, {column}: {words(value)}" if side == "" else f"{name}: {words(value)}",
            )
            for column, value in enumerate(row)
            if value is not None
        ]
        drawn.append((name, cells))
    return render(
        "heat",
        caption=f"{caption}; darkest: {words(most)}" if most > 0 else caption,
        rows=drawn,
        row_height=ROW,
        label_width=LABEL,
        cell_width=max(cell - 1, 0.5),
        width=LABEL + columns * cell,
    )
