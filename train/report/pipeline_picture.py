"""The schedule of a pipelined run, drawn on the clock of its measured ops, from the run's pipeline.json and config."""

from typing import Any

from markupsafe import Markup

from ...configs.errors import MeshwrightError
from ...configs.loader import validate_tree
from ...parallel.pipeline.tables.costs import Costs
from ...parallel.pipeline.tables.simulator import Timeline, simulate
from ...parallel.pipeline.tables.svg import render_svg
from ...parallel.pipeline.tables.table import Table
from ..engine.pipeline.pipeline_plan import make_pipeline_plan
from .markup import render

SHOWN = {
    "forward": "F, a device's layers",
    "input_gradient": "I",
    "weight_gradient": "W",
    "vocabulary_s": "S",
    "vocabulary_t": "T",
    "head_input_gradient": "head and loss",
    "tick": "a tick in which nobody works",
}


def schedule_picture(config: dict[str, Any], measured: dict[str, Any]) -> Markup | None:
    """The section of the report; None for a run without a pipeline, or one that was not measured."""
    if not measured:
        return None
    try:
        staged = make_pipeline_plan(validate_tree(config), pipe=measured["devices"])
    except MeshwrightError:
        return None
    if staged is None or list(staged.repeats) != measured["repeats"] or staged.table.name != measured["schedule"]:
        return None  # of an earlier session, under another schedule
    costs = Costs.model_validate(measured["costs"])
    timeline = simulate(staged.table, costs)
    times = [(words, f"{1000 * value:.3g} ms") for name, words in SHOWN.items() if (value := getattr(costs, name))]
    drawing = Markup(render_svg(staged.table, timeline=timeline).replace("<svg ", '<svg class="schedule" ', 1))
    return render("pipeline", drawing=drawing, times=times, summary=words_of(staged.table, timeline))


def words_of(schedule: Table, timeline: Timeline) -> str:
    """The schedule in a sentence."""
    shape = f"{schedule.stages} stages on {schedule.devices} devices, {schedule.microbatches} microbatches"
    held = ", ".join(f"{count:g}" for count in timeline.in_flight)
    return (
        f"{schedule.name}: {shape}, {schedule.ticks} ticks. Idle: {timeline.bubble:.1%} where devices run alone, "
        f"{timeline.lockstep_bubble:.1%} in lock-step. Microbatches held at most, by device: {held}."
    )
