"""The report of a run: one HTML file that needs nothing else, made from whatever the run directory holds.

write_report(Path("runs/quickstart"))   ->   runs/quickstart/report.html
"""

import os
from pathlib import Path

from markupsafe import Markup

from . import charts, header, plan_bars, timeline
from .charts import Curve
from .goodput import goodput_section
from .markup import render
from .mesh_picture import mesh_picture
from .pipeline_picture import schedule_picture
from .run_record import Record, read_record
from .sharding_pictures import sharding_picture
from .straggler_heatmap import processes_section

REPORT = "report.html"


def write_report(directory: Path) -> Path:
    """Write `directory`/report.html anew and say where it is. A file the run did not get to is named in the report."""
    path = directory / REPORT
    draft = directory / f".{REPORT}.{os.getpid()}"
    draft.write_text(page(read_record(directory)), encoding="utf-8")
    os.replace(draft, path)
    return path


def page(record: Record) -> str:
    """The whole document."""
    parts = [
        header.header(record),
        curves(record),
        *planned(record),
        schedule_picture(record.config, record.pipeline),
        timeline.samples_section(record.events),
        goodput_section(record),
        processes_section(record.detection),
        timeline.events_section(record.events),
        header.surroundings(record),
    ]
    return render("report", record=record, parts=[part for part in parts if part is not None])


def curves(record: Record) -> Markup | None:
    """Everything that changes over steps. None where nothing was logged."""
    if not record.metrics:
        return None
    loss = Curve("training", *record.series("loss"))
    held_out = Curve("held out", *record.series("held_out_loss"), dots=True)
    norm = Curve("gradient norm", *record.series("grad_norm"))
    rate = Curve("learning rate", *record.series("learning_rate"))
    speed = Curve("tokens/s", *record.series("tokens_per_second"))
    steps, shares = record.series("mfu")
    mfu = Curve("of the peak", steps, [100 * share for share in shares])
    times = [Curve("step", *record.series("step_seconds")), Curve("host", *record.series("host_seconds"))]
    marks = [event["step"] for event in record.events_named("restore") if "step" in event]
    traffic = [
        Curve("MB sent", *scaled(record.series("sent_bytes"), 1e-6)),
        Curve("predicted", *scaled(record.series("predicted_sent_bytes"), 1e-6)),
    ]
    figures = [
        charts.chart("Loss", [loss, held_out], marks=marks),
        charts.chart("Gradient norm", [norm], marks=marks, log=spread(norm.values) > 30),
        charts.chart("Learning rate", [rate], marks=marks),
        charts.chart("Throughput", [speed], marks=marks),
        charts.chart("Model FLOPs utilisation", [mfu], unit=" %", marks=marks),
        charts.chart("Seconds a step", times, unit=" s", marks=marks),
        *([charts.chart("Sent to other replicas", traffic, unit=" MB", marks=marks)] if traffic[0].steps else []),
    ]
    note = f"{'Dashed: the run went on from a checkpoint. ' if marks else ''}Horizontal: steps."
    return render("curves", charts=figures, note=note)


def scaled(series: tuple[list[int], list[float]], factor: float) -> tuple[list[int], list[float]]:
    """A series in another unit."""
    steps, values = series
    return steps, [factor * value for value in values]


def spread(values: list[float]) -> float:
    """Greatest over least of the positive ones; 1 where a logarithmic axis could not hold them all."""
    known = [value for value in values if value == value]
    return max(known) / min(known) if known and min(known) > 0 else 1.0


def planned(record: Record) -> list[Markup]:
    """What plan.json tells; nothing where it is missing."""
    plan = record.plan
    if not plan:
        return []
    sizes = plan.get("mesh") or {}
    parts = [plan_bars.memory_section(plan), plan_bars.communication_section(plan)]
    if plan.get("devices"):
        parts.append(mesh_picture(sizes, plan["devices"]))
    if plan.get("arrays"):
        parts.append(sharding_picture(plan["arrays"], sizes))
    return parts
