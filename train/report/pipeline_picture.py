"""A picture of a pipeline schedule, in the measured times of its ops, from the run's pipeline.json and config."""

from typing import Any

from markupsafe import Markup

from ...configs.errors import MeshwrightError
from ...configs.loader import validate_tree
from ...parallel.pipeline.tables.costs import Costs
from ...parallel.pipeline.tables.simulator import simulate
from ...parallel.pipeline.tables.svg import render_svg
from ..engine.pipeline.pipeline_plan import make_pipeline_plan
from .markup import render

COST_LABELS = {
    "forward": "F, the layers of a device",
    "input_gradient": "I",
    "weight_gradient": "W",
    "vocabulary_s": "S",
    "vocabulary_t": "T",
    "head_input_gradient": "head and loss",
    "tick": "a tick without ops",
}


def schedule_picture(config: dict[str, Any], measured: dict[str, Any]) -> Markup | None:
    """The section of the report. None for a run without a pipeline, or one that was not measured."""
    if not measured:
        return None
    try:
        plan = make_pipeline_plan(validate_tree(config), pipe=measured["devices"])
    except MeshwrightError:
        return None
    if plan is None or list(plan.repeats) != measured["repeats"] or plan.table.name != measured["schedule"]:
        return None  # measured in an earlier session, under another schedule
    costs = Costs.model_validate(measured["costs"])
    table, timeline = plan.table, simulate(plan.table, costs)
    values = {label: getattr(costs, name) for name, label in COST_LABELS.items()}
    times = [(label, f"{1000 * value:.3g} ms") for label, value in values.items() if value]
    drawing = Markup(render_svg(table, timeline=timeline).replace("<svg ", '<svg class="schedule" ', 1))
    in_flight = ", ".join(f"{count:g}" for count in timeline.in_flight)
    summary = (
        f"{table.name}: {table.stages} stages on {table.devices} devices, {table.microbatches} microbatches, "
        f"{table.ticks} ticks. Idle: {timeline.bubble:.1%} if devices start as soon as they can, "
        f"{timeline.lockstep_bubble:.1%} in lock-step. Most microbatches in flight, by device: {in_flight}."
    )
    return render("pipeline", drawing=drawing, times=times, summary=summary)
