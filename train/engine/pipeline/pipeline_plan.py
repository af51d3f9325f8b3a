"""The pipeline plan: schedule table, layers of each stage, and the order of layers in the stacked arrays.

    make_pipeline_plan(config, pipe=4) -> PipelinePlan | None

This module imports no JAX, so that `validate` can check a pipeline before a device is touched. Stacked weights are
[pipe * chunks * repeats, ...] in the order of devices, chunks and repeats, where `repeats` are those of the largest
stage. A repeat is one copy of the layer pattern. `order` is the repeat at each place, -1 if a shorter stage has none.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ....configs.errors import UserError
from ....configs.run import RunConfig
from ....parallel.pipeline.tables.fused_backward import fuse_backward
from ....parallel.pipeline.tables.layer_balance import even_layers, redistribute_layers
from ....parallel.pipeline.tables.lowering import direction
from ....parallel.pipeline.tables.schedules.registry import SCHEDULES, make_table
from ....parallel.pipeline.tables.table import Op, Table


@dataclass(frozen=True)
class PipelinePlan:
    """The pipeline of one model."""

    table: Table
    forward: Table  # forward only, for evaluation
    repeats: tuple[int, ...]  # of the layer pattern, for each stage
    teacher: "PipelinePlan | None" = None  # the forward-only pipeline of a teacher

    @property
    def max_repeats(self) -> int:
        """Repeats of the largest stage, hence the places in each chunk."""
        return max(self.repeats)

    @property
    def order(self) -> tuple[int, ...]:
        """The repeat at each place of the stacked arrays; -1: none."""
        first_repeats = [sum(self.repeats[:stage]) for stage in range(len(self.repeats))]
        return tuple(
            first_repeats[stage] + number if number < self.repeats[stage] else -1
            for stage in self.table.placement.reshape(-1).tolist()
            for number in range(self.max_repeats)
        )


def check_pipeline(config: RunConfig) -> None:
    """Raise UserError if the pipeline of `config` does not fit, as far as that can be known without devices."""
    check_schedule_name(config.pipeline.schedule)
    if (count := config.mesh.device_count) is not None:
        make_pipeline_plan(config, pipe=config.mesh.resolve_sizes(count)["pipe"])


def check_schedule_name(schedule: str) -> None:
    """Raise UserError for an unknown schedule and for one that does not train."""
    known = [name for name, family in SCHEDULES.items() if family.trains and "path" not in family.options]
    if schedule not in known and not schedule.endswith(".csv"):
        raise UserError.no_match("pipeline.schedule", [schedule], candidates=[*known, "PATH.csv"])


def make_pipeline_plan(config: RunConfig, *, pipe: int) -> PipelinePlan | None:
    """Plan the pipeline of `config` over `pipe` devices; None for one device. Raises UserError if it does not fit."""
    if pipe == 1:
        return None
    settings = config.pipeline
    check_schedule_name(settings.schedule)
    path = Path(settings.schedule) if settings.schedule.endswith(".csv") else None
    table = make_table(
        settings.schedule if path is None else "file",
        path=path,
        devices=pipe,
        microbatches=config.microbatches,
        chunks=settings.chunks,
        vocabulary=settings.vocab_parallel,
        memory_limit=settings.memory_limit,
    )
    if settings.backward == "fused":
        table = fuse_backward(table)
    forward = make_table(
        "forward-only", devices=pipe, microbatches=config.microbatches, placement=table.placement,
        vocabulary=settings.vocab_parallel,
    )  # fmt: skip
    repeats = repeats_per_stage(config, stages=table.stages)
    if table.microbatches < pipe:
        raise UserError(
            f"microbatches: {table.microbatches} leave most of {pipe} pipeline devices idle at any time; use at least "
            f"{pipe}, which must divide data.global_batch ({config.data.global_batch}) over the batch axes"
        )
    for stage in range(table.stages - 1):
        direction(table.device_of(stage), table.device_of(stage + 1), pipe)  # raises if they are not neighbours
    if not np.isin(table.op, (Op.I, Op.B)).any():  # a validated table has all of its backward pass or none
        raise UserError(
            f"pipeline.schedule: {settings.schedule} has no backward pass, so nothing would train; use a schedule with "
            "I or B ops"
        )
    return PipelinePlan(table, forward, repeats, teacher=make_teacher_plan(config, pipe=pipe))


def make_teacher_plan(config: RunConfig, *, pipe: int) -> PipelinePlan | None:
    """Plan the forward-only pipeline of a teacher, one stage a device; None without a teacher. Raises UserError."""
    if not config.recipe.has_live_teacher:
        return None
    model = config.model if config.recipe.teacher is None else config.recipe.teacher
    pattern, repeats = model.segments[0]
    if repeats < pipe:
        raise UserError(
            f"recipe.teacher.layers: {model.layers} layers in patterns of {len(pattern)} cannot fill the {pipe} stages "
            "of mesh.pipe; use a smaller mesh.pipe, or set recipe.top_k, which stores the teacher's top tokens instead"
        )
    table = make_table("forward-only", devices=pipe, microbatches=config.microbatches)
    return PipelinePlan(table, table, tuple(even_layers(repeats, stages=pipe).tolist()))


def repeats_per_stage(config: RunConfig, *, stages: int) -> tuple[int, ...]:
    """Return the repeats of the layer pattern in each stage. Raises UserError if they cannot fill the stages."""
    pattern, repeats = config.model.segments[0]
    layers = config.pipeline.layers
    if isinstance(layers, list):
        return parse_layer_list(layers, pattern=len(pattern), total=repeats, stages=stages)
    if repeats < stages:
        raise UserError(
            f"model.layers: {config.model.layers} layers in patterns of {len(pattern)} cannot fill the {stages} stages "
            f"of schedule {config.pipeline.schedule} (mesh.pipe x chunks); use more layers, fewer chunks, or a smaller "
            "mesh.pipe"
        )
    if layers == "even":
        return tuple(even_layers(repeats, stages=stages).tolist())
    cost = head_cost(config) / len(pattern)
    return tuple(redistribute_layers(repeats, stages=stages, head_cost=cost, min_layers=1).tolist())


def head_cost(config: RunConfig) -> float:
    """FLOPs of the head over those of one layer; 0 if all devices share it. Source: arXiv:2411.05288, table 4."""
    model = config.model
    if config.pipeline.vocab_parallel:
        return 0.0
    attention = 2 * config.data.sequence_length * model.heads * model.head_width
    projections = 2 * (model.heads + model.key_value_heads) * model.head_width
    linear = model.embed * (projections + model.mlp * (2 if model.activation == "gelu" else 3))
    return model.embed * model.padded_vocab / (linear + attention / 2)


def parse_layer_list(layers: list[int], *, pattern: int, total: int, stages: int) -> tuple[int, ...]:
    """Return `pipeline.layers` as repeats of the layer pattern. Raises UserError if the list does not fit."""
    problem = None
    if len(layers) != stages:
        problem = f"has {len(layers)} entries and there are {stages} stages"
    elif sum(layers) != total * pattern:
        problem = f"adds up to {sum(layers)} and model.layers is {total * pattern}"
    elif any(count < 1 or count % pattern for count in layers):
        problem = f"must hold whole patterns of {pattern} layers, at least one a stage"
    if problem:
        raise UserError(f"pipeline.layers: {layers} {problem}; list the layers of each stage, first to last")
    return tuple(count // pattern for count in layers)
