"""Which layers stand where in a pipeline: the table, the layers of each stage, their places in the stacked arrays.

    staging(config, pipe=4) -> Staging | None

Imports no JAX: `validate` answers with it, and so does every other verb before a device is touched. Stacked weights are
[pipe * chunks * repeats, ...] in the order of devices, chunks and repeats, `repeats` being those of the largest stage;
`order` says which repeat of the layers' pattern stands at each place, -1 where a shorter stage has none.
"""

from dataclasses import dataclass
from pathlib import Path

from ....configs.errors import UserError
from ....configs.run import RunConfig
from ....parallel.pipeline.tables.fused_backward import fuse_backward
from ....parallel.pipeline.tables.layer_balance import even_layers, redistribute_layers
from ....parallel.pipeline.tables.lowering import direction
from ....parallel.pipeline.tables.schedules.registry import SCHEDULES, make_table
from ....parallel.pipeline.tables.table import Op, Table


@dataclass(frozen=True)
class PipelinePlan:
    """A pipeline's plan for one model."""

    table: Table
    forward: Table  # for evaluation
    repeats: tuple[int, ...]  # of each stage
    teacher: "PipelinePlan | None" = None  # of the model beside it that only reads, where there is one

    @property
    def max_repeats(self) -> int:
        """Repeats of the largest stage: places in each chunk."""
        return max(self.repeats)

    @property
    def order(self) -> tuple[int, ...]:
        """The repeat that stands at each place of the stacked arrays, -1: none."""
        firsts = [sum(self.repeats[:stage]) for stage in range(len(self.repeats))]
        return tuple(
            firsts[stage] + number if number < self.repeats[stage] else -1
            for stage in self.table.placement.reshape(-1).tolist()
            for number in range(self.max_repeats)
        )


def check_pipeline(config: RunConfig) -> None:
    """Raise UserError where the pipeline of `config` does not fit, as far as that is known without devices."""
    check_schedule_name(config.pipeline.schedule)
    if (count := config.mesh.count) is not None:
        make_pipeline_plan(config, pipe=config.mesh.resolved(count)["pipe"])


def check_schedule_name(schedule: str) -> None:
    """Raise UserError for a schedule that is none, or does not train."""
    known = [name for name, family in SCHEDULES.items() if family.trains and "path" not in family.options]
    if schedule not in known and not schedule.endswith(".csv"):
        raise UserError.no_match("pipeline.schedule", [schedule], known=[*known, "PATH.csv"])


def make_pipeline_plan(config: RunConfig, *, pipe: int) -> PipelinePlan | None:
    """The pipeline of `config` over `pipe` devices; None for one device. Raises UserError where none fits."""
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
        direction(table.device_of(stage), table.device_of(stage + 1), pipe)  # raises where they are no neighbours
    if not table_trains(table):
        raise UserError(f"pipeline.schedule: {settings.schedule} has no backward pass; {pipe} devices would not train")
    return PipelinePlan(table, forward, repeats, teacher=teacher_staging(config, pipe=pipe))


def teacher_staging(config: RunConfig, *, pipe: int) -> PipelinePlan | None:
    """The pipeline of a teacher: forward only, with a stage a device."""
    if not config.recipe.two_models:
        return None
    model = config.model if config.recipe.teacher is None else config.recipe.teacher
    pattern, repeats = model.segments[0]
    if repeats < pipe:
        raise UserError(
            f"recipe.teacher.layers: {model.layers} layers in patterns of {len(pattern)} cannot fill the {pipe} stages "
            "of mesh.pipe; use a smaller mesh.pipe, or set recipe.top_k so that the teacher's words are stored"
        )
    table = make_table("forward-only", devices=pipe, microbatches=config.microbatches)
    return PipelinePlan(table, table, tuple(even_layers(repeats, stages=pipe).tolist()))


def table_trains(table: Table) -> bool:
    """Whether there is a backward pass; a validated table has all of it or none."""
    return bool((table.op == Op.I).any() or (table.op == Op.B).any())


def repeats_per_stage(config: RunConfig, *, stages: int) -> tuple[int, ...]:
    """Repeats of the pattern for each stage. Raises UserError where there are too few, or the list does not add up."""
    pattern, repeats = config.model.segments[0]
    layers = config.pipeline.layers
    if isinstance(layers, list):
        return listed(layers, pattern=len(pattern), total=repeats, stages=stages)
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
    """The head's FLOPs over those of one layer; 0 where all devices share it. Source: arXiv:2411.05288, table 4."""
    model = config.model
    if config.pipeline.vocab_parallel:
        return 0.0
    attended = 2 * config.data.sequence_length * model.heads * model.head_width
    heads = 2 * (model.heads + model.key_value_heads) * model.head_width
    linear = model.embed * (heads + model.mlp * (2 if model.activation == "gelu" else 3))
    return model.embed * model.padded_vocab / (linear + attended / 2)


def listed(layers: list[int], *, pattern: int, total: int, stages: int) -> tuple[int, ...]:
    """`pipeline.layers` as repeats of the pattern."""
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
