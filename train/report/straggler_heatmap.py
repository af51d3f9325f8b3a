"""Heat maps of detection.json, which the launcher writes: step time of each process without waiting, quality of links.

In a synchronous step every process takes as long as the slowest one. The seconds in which a process does not wait for
others do differ: the others wait for a process whose row is darker (MegaScale, NSDI'24).
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from .markup import render

ROW, LABEL, WIDTH = 20, 84, 640  # pixels
MOST_ROWS = 256  # of more processes, every second, third, ... is drawn


def processes_section(detection: Mapping[str, Any]) -> Markup | None:
    """The diagnoses, and the maps. None for a run without a launcher."""
    heat, links, diagnoses = detection.get("heat") or [], detection.get("links"), detection.get("diagnoses") or []
    if not heat and not links and not diagnoses:
        return None
    maps = []
    if heat:
        # Column: the last step of a sample. Row: a slot, which is empty in columns of a run with fewer processes.
        count = max(len(column["own"]) for column in heat)
        rows = [[column["own"][row] if row < len(column["own"]) else None for column in heat] for row in range(count)]
        caption = f"Seconds of a step without waiting, by slot, steps {heat[0]['step']} to {heat[-1]['step']}"
        maps.append(heat_map(caption, rows, label=lambda value: f"{value:.3f} s", row_label="slot"))
    if links:
        # [from, to]: milliseconds of delay, and seconds for a megabyte, so that dark is bad in both.
        delay = [[None if value is None else 1e3 * value for value in row] for row in links["delay"]]
        transfer = [[None if not value else 1e6 / value for value in row] for row in links["bandwidth"]]
        maps.append(heat_map("Delay of a link, from row to column", delay, label=lambda value: f"{value:.2f} ms"))
        bandwidth = lambda value: f"{1 / value:.0f} MB/s"
        maps.append(heat_map("Bandwidth of a link, dark is slow", transfer, label=bandwidth))
    return render("processes", diagnoses=[diagnosis_row(diagnosis) for diagnosis in diagnoses], maps=maps)


def diagnosis_row(diagnosis: Mapping[str, Any]) -> tuple[Any, ...]:
    """Time of day, step, kind, whether communication is slow, and suspects with evidence."""
    pairs = zip(diagnosis["suspects"], diagnosis.get("slots", diagnosis["suspects"]), strict=True)
    suspects = ", ".join(str(process) if process == slot else f"{process} (slot {slot})" for process, slot in pairs)
    clock = time.strftime("%H:%M:%S", time.localtime(diagnosis["time"]))
    side = "communication" if diagnosis["communication"] else "not communication"
    evidence = f"process {suspects}: {diagnosis['evidence']}" if suspects else diagnosis["evidence"]
    return clock, diagnosis["step"], diagnosis["kind"], side, evidence


def heat_map(
    caption: str, rows: Sequence[Sequence[float | None]], *, label: Callable[[float], str], row_label: str = ""
) -> Markup:
    """A grid of cells, the darker the nearer to the largest value; a cell without a value is empty."""
    largest = max((value for row in rows for value in row if value is not None), default=0.0)
    stride = math.ceil(len(rows) / MOST_ROWS)
    columns = max(len(row) for row in rows)
    cell = min(WIDTH / columns, ROW * 2.2)
    labelled = []
    for number, row in list(enumerate(rows))[::stride]:
        name = f"{row_label} {number}".strip()
        cells = [
            (
                LABEL + column * cell,
                0.06 + 0.94 * value / largest if largest > 0 else 0.06,
                f"{name}, {column}: {label(value)}" if row_label == "" else f"{name}: {label(value)}",
            )
            for column, value in enumerate(row)
            if value is not None
        ]
        labelled.append((name, cells))
    return render(
        "heat",
        caption=f"{caption}; darkest: {label(largest)}" if largest > 0 else caption,
        rows=labelled,
        row_height=ROW,
        label_width=LABEL,
        cell_width=max(cell - 1, 0.5),
        width=LABEL + columns * cell,
    )
