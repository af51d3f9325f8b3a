"""A training run, in order of time: configuration -> data -> mesh -> program -> state -> loop -> report.

summary = train(config, process_info=read_process_info())
"""

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax.numpy as jnp

from ..checkpoint.checkpoint_directory import CheckpointDirectory
from ..checkpoint.memory_store import open_memory_store
from ..checkpoint.storage import Storage
from ..configs.checks.mesh_fit import check_mesh_fit
from ..configs.errors import Preemption, UserError
from ..configs.run import RunConfig
from ..configs.sections.training import CheckpointConfig
from ..memory.offload_check import check_offload, scanned_gradient
from ..memory.policy import emitted_tensors, tensor_decisions
from ..models.families.safetensors_files import copy_companions
from ..parallel.mesh import make_mesh
from ..parallel.multihost import barrier, broadcast_int
from .checkpoint_schedule import CheckpointSchedule
from .checkpointer import Checkpointer
from .core.event_log import EventLog
from .core.fence import Fence, FencedOutError
from .core.heartbeat import ProgressReporter
from .core.process_env import ProcessInfo
from .core.run_directory import open_directory, write_json
from .core.run_paths import parent_and_name
from .core.sample_log import SampleLog
from .data import assemble
from .data.assemble import Data
from .engine import runtime
from .engine.host_data import make_process_shard
from .engine.island_replica import island_config
from .engine.op_profiler import profile_ops
from .engine.pipeline.pipeline_plan import check_pipeline
from .engine.pipeline.pool_offload_check import pooled_gradient
from .engine.privacy.accounting import drop_partial_batches, epsilon_metric, with_calibrated_noise
from .engine.program import Program, build
from .engine.quantized_base import save_base
from .infer.evaluator import Evaluator
from .infer.generation_eval import Metric, load_metrics
from .infer.precompute_logprobs import with_reference_logprobs
from .islands.join import join_islands
from .loop import Loop
from .metrics.metric_sinks import check_sinks
from .metrics.metrics_logger import MetricsLogger
from .metrics.throughput import Meter
from .objectives.distillation import check_teacher
from .plan import compile_plan
from .preemption import StopRequest
from .report.html import write_report
from .restore import restore_latest
from .sdc_check import make_state_check
from .snapshot_writer import SnapshotWriter

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Summary:
    """The result of a finished run."""

    directory: Path
    steps: int
    metrics: dict[str, float]  # the newest value of each metric
    initial_metrics: dict[str, float]  # of the evaluation before the first step; empty without one


def train(config: RunConfig, *, process_info: ProcessInfo, root: Path = Path("runs")) -> Summary:
    """Train from the newest checkpoint in runs/NAME, or from the seed, up to step `config.steps`.

    Raises UserError, before a device is touched, if the request cannot work. Raises Preemption, after the state was
    saved, if the process is asked to stop.
    """
    # Configuration, data and program. Nothing is written until everything is checked.
    parent, name = parent_and_name(config, root)
    directory = open_directory(config, root=parent, name=name, write=False)
    check_steps_reached(config.steps, max(CheckpointDirectory(directory / "checkpoints").steps, default=0), directory)
    data, score_functions = load_checked_data(config, process_info)
    program = build_program(with_calibrated_noise(config, data), process_info)
    # The run directory, where only processes of the newest epoch may write.
    open_directory(config, root=parent, name=name, write=process_info.is_first)
    fence = Fence(directory, process_info.epoch)
    if process_info.is_first:
        fence.claim()
    event_log = EventLog(directory, enabled=process_info.is_first, check_allowed=fence.check)
    checkpoint, corpus = program.config.checkpoint, data.fingerprint
    with ExitStack() as stack:
        progress = stack.enter_context(closing(ProgressReporter(process_info, fence)))
        report_waiting = progress.report_waiting
        storage = Storage(
            directory / "checkpoints", layout=program.layout, check_allowed=fence.check, timeout=checkpoint.timeout
        )
        stack.enter_context(closing(storage))
        stop = stack.enter_context(StopRequest())
        stack.enter_context(log_failures(event_log))

        # The state: from memory, from storage, or new.
        memory = None
        if checkpoint.memory_every:
            memory = open_memory_store(
                directory, layout=program.layout.name, host=process_info.host or 0, launch_slot=process_info.slot
            )
        barrier(seconds=config.elastic.start_timeout)
        state, start = restore_latest(program, storage, memory, event_log, corpus=corpus)
        check_steps_reached(config.steps, start, directory)
        if start == 0:
            save_base(program, state, directory, check_allowed=fence.check)
        shard = make_process_shard(program)

        def data_from(step: int, data: Data = data) -> Data:
            return with_reference_logprobs(program, data, samples=shard.samples(step, config.steps))

        data = data_from(start)

        # What happens beside the steps: saves, and synchronization with other islands.
        snapshots = None
        if memory is not None:
            snapshots = SnapshotWriter(checkpoint, memory, event_log, fence.check)
            stack.callback(snapshots.close)
            snapshots.reserve(state)
        checkpointer = Checkpointer(
            checkpoint,
            storage,
            event_log,
            metadata={"corpus": corpus, "origin": program.origin},
            snapshots=snapshots,
            report_waiting=report_waiting,
            check_state=make_state_check(program, progress),
        )
        island_sync = None
        if config.islands:
            joined = join_islands(
                config, program, event_log, corpus=corpus, report_waiting=report_waiting, should_stop=stop.should_stop
            )
            island_sync = stack.enter_context(joined)

        # The compiled programs and their plan.
        if process_info.is_first:
            logger.info("%s: from step %d to step %d; compiling", directory, start, config.steps)
        began = time.monotonic()
        train_step = program.compiled_step()
        synchronize = island_sync or program.compiled_synchronization()
        evaluator = Evaluator(program, data, program.compiled_evaluation(), score_functions) if data.held_out else None
        event_log.record("compile", seconds=time.monotonic() - began)
        barrier(seconds=config.elastic.start_timeout)
        plan = compile_plan.make_plan(program, train_step)
        if process_info.is_first:
            write_description(program, data, plan, directory)
        with MetricsLogger(program.config, directory, event_log, start=start) as metrics_logger:
            metrics_logger.note(compile_plan.render(plan))
            loop = Loop(
                program=program,
                data=data,
                data_from=data_from,
                shard=shard,
                directory=directory,
                train_step=train_step,
                synchronize=synchronize,
                island_sync=island_sync,
                evaluator=evaluator,
                checkpointer=checkpointer,
                checkpoint_schedule=CheckpointSchedule(checkpoint.every, directory, event_log, broadcast_int),
                sample_log=open_sample_log(directory, process_info, fence, enabled=config.logging.ledger),
                stop_request=stop,
                progress=progress,
                meter=Meter.from_config(program.config, plan),
                metrics_logger=metrics_logger,
                privacy_metrics=epsilon_metric(program.config, data),
            )
            state = loop.run(state, start)

        # The end: the last save is complete, ops are measured, the report is written.
        checkpointer.finish()
        if program.pipeline_plan is not None and config.pipeline.measure:
            progress.report(config.steps, "measure")
            measured = profile_ops(program, state, data)
            if process_info.is_first:
                write_json(directory / "pipeline.json", measured)
        event_log.record("finish", step=config.steps, **metrics_logger.latest)
    if process_info.is_first:
        write_report(directory)
    return Summary(directory, config.steps, metrics_logger.latest, metrics_logger.initial)


def load_checked_data(config: RunConfig, process_info: ProcessInfo) -> tuple[Data, Sequence[Metric]]:
    """Return the data and the user's score functions, after every check that needs no device. Raises UserError."""
    check_pipeline(config)
    check_snapshot_agents(config.checkpoint, process_info)
    check_sinks(config.logging)
    data = assemble.load_run_data(island_config(config))
    check_teacher(config, data.tokenizer)
    return drop_partial_batches(config, data), load_metrics(config.evaluation.metrics)


def build_program(config: RunConfig, process_info: ProcessInfo) -> Program:
    """Return the program of this job on its mesh. Raises UserError if the mesh at hand does not fit `config`."""
    job_config = island_config(config)
    runtime.start(job_config, process_info)
    mesh = make_mesh(job_config.mesh)
    try:
        check_mesh_fit(config, dict(mesh.shape))
    except ValueError as error:
        raise UserError(str(error)) from None
    program = build(job_config, mesh)
    check_offload(
        job_config.model,
        tensor_decisions(job_config.memory, tensors=emitted_tensors(job_config.model)),
        platform=mesh.devices.flat[0].platform,
        gradient=partial(
            scanned_gradient if program.pipeline_plan is None else pooled_gradient,
            compute=jnp.dtype(job_config.precision.compute),
        ),
    )
    return program


def check_steps_reached(steps: int, reached: int, directory: Path) -> None:
    """Raise UserError if the run is already past the last step it is asked for: a run never loses updates."""
    if reached > steps:
        raise UserError(
            f"steps: {steps}, but {directory} has reached step {reached}; set steps to at least {reached}, or choose "
            "another name"
        )


def check_snapshot_agents(checkpoint: CheckpointConfig, process_info: ProcessInfo) -> None:
    """Raise UserError if snapshots are to be protected by parity and this host has no snapshot agent."""
    if checkpoint.parity != "none" and process_info.host is None:
        raise UserError(
            f"checkpoint.parity: {checkpoint.parity} needs a snapshot agent on every host, which `meshwright launch` "
            "starts; use `meshwright launch`, or set checkpoint.parity to none"
        )


def open_sample_log(directory: Path, process_info: ProcessInfo, fence: Fence, *, enabled: bool) -> SampleLog:
    """Open the log of which samples this process feeds to which step."""
    return SampleLog(
        directory,
        epoch=fence.epoch or 0,
        process=process_info.process,
        processes=process_info.processes,
        enabled=enabled,
        check_allowed=fence.check,
    )


@contextmanager
def log_failures(event_log: EventLog) -> Iterator[None]:
    """Record a failure inside the block in the event log. Being stopped from outside is no failure."""
    try:
        yield
    except (Preemption, FencedOutError, KeyboardInterrupt):
        raise
    except BaseException as error:
        with suppress(UserError):  # a full disk must not hide the failure itself
            event_log.record("failure", error=type(error).__name__, message=str(error)[:500])
        raise


def write_description(program: Program, data: Data, plan: dict, directory: Path) -> None:
    """Write what belongs to the run's checkpoints into `directory`: tokenizer, chat template, plan, environment."""
    config = program.config
    data.tokenizer.save(directory)
    if config.model.origin is not None and config.data.tokenizer.file == config.model.origin:
        copy_companions(config.model.origin, directory)
    if config.all_data.has_conversations and data.template is not None:
        (directory / "chat_template.jinja").write_text(data.template.source, encoding="utf-8")
    write_json(directory / "plan.json", plan)
    write_json(directory / "environment.json", runtime.environment(config, data, program.mesh))
