"""A training run, in order of time: configuration -> mesh -> data -> program -> state -> loop -> report.

train(config, world=world()) -> Summary
"""

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax.numpy as jnp

from ..checkpoint.checkpoint_directory import Shelf
from ..checkpoint.memory_store import memory_of
from ..checkpoint.storage import Storage
from ..configs.checks.mesh_fit import check_fits
from ..configs.errors import Preempted, UserError
from ..configs.run import RunConfig
from ..configs.sections.training import CheckpointConfig
from ..memory.offload_check import check_offload, scanned_gradient
from ..memory.policy import decisions, emitted
from ..models.families.safetensors_files import copy_companions
from ..parallel.mesh import make_mesh
from ..parallel.multihost import firsts, together
from .checkpoint_schedule import Pace
from .checkpointer import Saving
from .core.event_log import Journal
from .core.fence import Fence, Fenced
from .core.heartbeat import Progress
from .core.process_env import World
from .core.run_directory import open_directory, write_json
from .core.run_paths import place
from .core.sample_log import Ledger
from .data import assemble
from .data.assemble import Data
from .engine import runtime
from .engine.host_data import share_of
from .engine.island_replica import own
from .engine.op_profiler import time_ops
from .engine.pipeline.pipeline_plan import check_staging
from .engine.pipeline.pool_offload_check import pooled_gradient
from .engine.privacy.accounting import budgeted, dealt, spending
from .engine.program import Program, build
from .engine.quantized_base import keep
from .infer.evaluator import Assessment
from .infer.generation_eval import Metric, metric_functions
from .infer.precompute_logprobs import referenced
from .islands.join import joined
from .loop import Loop
from .metrics.metric_sinks import check_sinks
from .metrics.metrics_logger import Telling
from .metrics.throughput import Meter
from .objectives.distillation import check_teacher
from .plan import compile_plan
from .preemption import StopRequest
from .report.html import write_report
from .restore import recovered
from .sdc_check import vouching
from .snapshot_writer import Snapshots

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Summary:
    """What a finished run amounts to."""

    directory: Path
    steps: int
    metrics: dict[str, float]  # of the last step and the last evaluation
    first: dict[str, float]  # of the evaluation before the first step, where there was one


def train(config: RunConfig, *, world: World, root: Path = Path("runs")) -> Summary:
    """Train from the newest checkpoint of runs/NAME, or from the seed, to `config.steps`.

    Raises UserError before a device is touched where the request cannot work, and Preempted, the state saved, where
    asked to stop.
    """
    parent, name = place(config, root)
    # Refuses another run's directory; nothing is written until all is checked.
    found = open_directory(config, root=parent, name=name, write=False)
    check_ahead(config.steps, max(Shelf(found / "checkpoints").steps, default=0), found)
    data, metrics = checked(config, world)
    program = programmed(budgeted(config, data), world)
    directory = open_directory(config, root=parent, name=name, write=world.first)
    fence = fence_of(directory, world)
    journal = Journal(directory, enabled=world.first, allowed=fence.check)
    checkpoint, corpus = program.config.checkpoint, data.fingerprint
    with ExitStack() as stack:
        progress = stack.enter_context(closing(Progress(world, fence)))
        storage = Storage(
            directory / "checkpoints", layout=program.layout, allowed=fence.check, timeout=checkpoint.timeout
        )
        stack.enter_context(closing(storage))
        stop = stack.enter_context(StopRequest())
        stack.enter_context(failures_told(journal))

        memory = None
        if checkpoint.memory_every:
            memory = memory_of(directory, layout=program.layout.name, host=world.host or 0, place=world.slot)
        together(seconds=config.elastic.start_timeout)
        state, start = recovered(program, storage, memory, journal, corpus=corpus)
        check_ahead(config.steps, start, directory)
        if start == 0:
            keep(program, state, directory, allowed=fence.check)
        share = share_of(program)

        def reread(first: int, data: Data = data) -> Data:
            return referenced(program, data, samples=share.samples(first, config.steps))

        data = reread(start)
        snapshots = None
        if memory is not None:
            snapshots = Snapshots(checkpoint, memory, journal, fence.check)
            stack.callback(snapshots.close)
            snapshots.reserve(state)
        stamp = {"corpus": corpus, "origin": program.origin}
        saving = Saving(checkpoint, storage, journal, stamp, snapshots, progress.waits, vouching(program, progress))
        meetings = None
        if config.islands:
            meetings = stack.enter_context(
                joined(config, program, journal, corpus=corpus, alive=progress.waits, stop=stop.requested)
            )

        if world.first:
            logger.info(
                "%s: %s to step %d; compiling",
                directory,
                f"from step {start}" if start else "from the start",
                config.steps,
            )
        began = time.monotonic()
        step, meet = program.compiled_step(), meetings or program.compiled_meetings()
        assess = Assessment(program, data, program.compiled_evaluation(), metrics) if data.held_out else None
        journal.record("compile", seconds=time.monotonic() - began)
        together(seconds=config.elastic.start_timeout)
        made = compile_plan.make_plan(program, step)
        if world.first:
            describe(program, data, made, directory)
        with Telling(program.config, directory, journal, start=start) as told:
            told.note(compile_plan.render(made))
            loop = Loop(
                program=program,
                data=data,
                reread=reread,
                share=share,
                directory=directory,
                step=step,
                meet=meet,
                meetings=meetings,
                assess=assess,
                saving=saving,
                pace=Pace(checkpoint.every, directory, journal, firsts),
                ledger=ledger_of(directory, world, fence, kept=config.logging.ledger),
                stop=stop,
                progress=progress,
                meter=Meter.of(program.config, made),
                told=told,
                spent=spending(program.config, data),
            )
            state = loop.run(state, start)
        saving.finish()
        if program.staging is not None and config.pipeline.measure:
            progress.report(config.steps, "measure")
            measured = time_ops(program, state, data)
            if world.first:
                write_json(directory / "pipeline.json", measured)
        journal.record("finish", step=config.steps, **told.last)
    if world.first:
        write_report(directory)
    return Summary(directory, config.steps, told.last, told.first)


def checked(config: RunConfig, world: World) -> tuple[Data, Sequence[Metric]]:
    """The data and the user's measures, with all that can be refused without touching a device. Raises UserError."""
    check_staging(config)
    check_keepers(config.checkpoint, world)
    check_sinks(config.logging)
    data = assemble.of_run(own(config))
    check_teacher(config, data.tokenizer)
    return dealt(config, data), metric_functions(config.evaluation.metrics)


def programmed(config: RunConfig, world: World) -> Program:
    """This job's program on its mesh. Raises UserError where the mesh there is does not fit the request."""
    mine = own(config)
    runtime.start(mine, world)
    mesh = make_mesh(mine.mesh)
    try:
        check_fits(config, dict(mesh.shape))
    except ValueError as error:
        raise UserError(str(error)) from None
    program = build(mine, mesh)
    check_offload(
        mine.model,
        decisions(mine.memory, tensors=emitted(mine.model)),
        platform=mesh.devices.flat[0].platform,
        gradient=partial(
            scanned_gradient if program.staging is None else pooled_gradient, compute=jnp.dtype(mine.precision.compute)
        ),
    )
    return program


def check_ahead(steps: int, reached: int, directory: Path) -> None:
    """Raise UserError where the run has gone further than it is asked to: nothing goes back."""
    if reached > steps:
        raise UserError(
            f"steps: {steps}, but {directory} has reached {reached}; use {reached} or more, or another name"
        )


def check_keepers(checkpoint: CheckpointConfig, world: World) -> None:
    """Raise UserError where snapshots are to be protected and nobody is there to do it."""
    if checkpoint.parity != "none" and world.host is None:
        raise UserError(
            f"checkpoint.parity: {checkpoint.parity} needs a keeper on every host, which `meshwright launch` starts; "
            "launch the run, or set it to none"
        )


def fence_of(directory: Path, world: World) -> Fence:
    """The right of this process's epoch to write to the run directory; the first process claims it."""
    fence = Fence(directory, world.epoch)
    if world.first:
        fence.claim()
    return fence


def ledger_of(directory: Path, world: World, fence: Fence, *, kept: bool) -> Ledger:
    """Where this process notes which samples it fed to which step, where such notes are `kept`."""
    return Ledger(
        directory,
        epoch=fence.epoch or 0,
        process=world.process,
        processes=world.processes,
        enabled=kept,
        allowed=fence.check,
    )


@contextmanager
def failures_told(journal: Journal) -> Iterator[None]:
    """What goes wrong inside is journalled."""
    try:
        yield
    except (Preempted, Fenced, KeyboardInterrupt):
        raise
    except BaseException as error:
        with suppress(UserError):  # a full disk must not hide what happened
            journal.record("failure", error=type(error).__name__, message=str(error)[:500])
        raise


def describe(program: Program, data: Data, made: dict, directory: Path) -> None:
    """Write what goes with the run's checkpoints: tokenizer, chat template, plan, environment."""
    config = program.config
    data.tokenizer.save(directory)
    if config.model.origin is not None and config.data.tokenizer.file == config.model.origin:
        copy_companions(config.model.origin, directory)
    if config.reads.chats and data.template is not None:
        (directory / "chat_template.jinja").write_text(data.template.source, encoding="utf-8")
    write_json(directory / "plan.json", made)
    write_json(directory / "environment.json", runtime.describe(config, data, program.mesh))
