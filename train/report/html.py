"""The report of a run: one HTML file that refers to no other, made from the files of the run directory.

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
    """Write `directory`/report.html and return its path. The report names files of the run that are missing."""
    path = directory / REPORT
    temporary = directory / f".{REPORT}.{os.getpid()}"
    temporary.write_text(render_report(read_record(directory)), encoding="utf-8")
    os.replace(temporary, path)
    return path


def render_report(record: Record) -> str:
    """The HTML document."""
    parts = [
        header.header(record),
        curves_section(record),
        *plan_sections(record),
        schedule_picture(record.config, record.pipeline),
        timeline.samples_section(record.events),
        goodput_section(record),
        processes_section(record.detection),
        timeline.events_section(record.events),
        header.environment_section(record),
    ]
    return render("report", record=record, parts=[part for part in parts if part is not None])


def curves_section(record: Record) -> Markup | None:
    """Charts of the metrics over steps. None if nothing was logged."""
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
    traffic = []
    for label, name in (("MB sent", "sent_bytes"), ("predicted", "predicted_sent_bytes")):
        sent_steps, sent = record.series(name)
        traffic.append(Curve(label, sent_steps, [1e-6 * count for count in sent]))
    positive = [value for value in norm.values if value == value]
    log = bool(positive) and min(positive) > 0 and max(positive) / min(positive) > 30
    figures = [
        charts.chart("Loss", [loss, held_out], marks=marks),
        charts.chart("Gradient norm", [norm], marks=marks, log=log),
        charts.chart("Learning rate", [rate], marks=marks),
        charts.chart("Throughput", [speed], marks=marks),
        charts.chart("Model FLOPs utilisation", [mfu], unit=" %", marks=marks),
        charts.chart("Seconds a step", times, unit=" s", marks=marks),
        *([charts.chart("Sent to other replicas", traffic, unit=" MB", marks=marks)] if traffic[0].steps else []),
    ]
    note = f"{'Dashed: the run continued from a checkpoint. ' if marks else ''}Horizontal: steps."
    return render("curves", charts=figures, note=note)


def plan_sections(record: Record) -> list[Markup]:
    """The sections made from plan.json; none if it is missing."""
    if not (plan := record.plan):
        return []
    sizes = plan.get("mesh") or {}
    parts = [plan_bars.memory_section(plan), plan_bars.communication_section(plan)]
    if plan.get("devices"):
        parts.append(mesh_picture(sizes, plan["devices"]))
    if plan.get("arrays"):
        parts.append(sharding_picture(plan["arrays"], sizes))
    return parts
