"""A training run, in order of time: configuration -> mesh -> data -> program -> state -> loop -> report.

    train(config) -> Summary

The loop never waits for the device: the metrics of a step are read while the next one runs.
"""

import math
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from ..checkpoint.memory import memory_of
from ..checkpoint.storage import Storage
from ..configs.errors import MeshwrightError, Preempted, UserError
from ..configs.run import RunConfig, check_fits
from ..configs.training import CheckpointConfig
from ..memory.policy import decisions, emitted
from ..memory.selfcheck import check_offload
from ..models.hf.files import copy_companions
from ..parallel.lowcomm.bytes import sent
from ..parallel.mesh import make_mesh
from ..parallel.state import TrainState, combine
from . import environment, plan
from .answering import Metric, answered, complete, metric_functions
from .base import keep
from .data import assemble
from .data.assemble import Data
from .data.batches import batches
from .directory import open_directory, write_json
from .evaluation import evaluate
from .feed import local_rows, to_devices
from .islands import Island, own
from .joining import joined
from .launch.detection import WAIT
from .launch.fence import Fence, Fenced
from .launch.progress import Progress
from .launch.world import World
from .meetings import Meetings, Moved
from .meter import Meter
from .op_times import op_times
from .pacing import Pace
from .places import place
from .profiling import Profile
from .program import Program, build
from .recovery import agreed, recovered
from .reference import referenced
from .repair import without_teacher
from .replicas import Replicas, on_host
from .report.html import write_report
from .report.journal import Journal
from .report.ledger import Ledger
from .report.progress import open_progress
from .report.sinks import Sink, check_sinks, open_sinks
from .sampling import Sampling
from .saving import Saving
from .snapshots import Snapshots
from .staging import check_staging
from .stop import StopRequest


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
    whole, config = config, own(config)
    root, name = place(whole, root)
    check_staging(config)
    check_keepers(config.checkpoint, world)
    data = assemble.build(config.data, seed=config.seed, model_vocab=config.model.vocab)
    # Refuses another run's; nothing is written until all is checked.
    open_directory(whole, root=root, name=name, write=False)
    check_sinks(config.logging)
    metrics = metric_functions(config.evaluation.metrics)
    environment.start(config, world)
    mesh = make_mesh(config.mesh)
    check_fits(whole, dict(mesh.shape))
    program = build(config, mesh)
    check_offload(
        config.model,
        decisions(config.memory, tensors=emitted(config.model)),
        platform=mesh.devices.flat[0].platform,
        compute=jnp.dtype(config.precision.compute),
    )

    directory = open_directory(whole, root=root, name=name, write=world.first)
    with ExitStack() as stack:
        fence = fence_of(directory, world)
        journal = Journal(directory, enabled=world.first, allowed=fence.check)
        progress = stack.enter_context(closing(Progress(world, fence)))
        progress.report(0, "start")
        storage = Storage(directory / "checkpoints", layout=program.layout, allowed=fence.check)
        stack.enter_context(closing(storage))
        stop = stack.enter_context(StopRequest())
        try:
            memory = (
                memory_of(directory, layout=program.layout.name, host=world.host)
                if config.checkpoint.memory_every
                else None
            )
            state, start = recovered(program, storage, memory, journal, corpus=data.fingerprint)
            if start == 0:
                keep(program, state, directory, allowed=fence.check)
            size = config.data.global_batch
            data = referenced(program, data, samples=range(start * size, config.steps * size))
            snapshots = None
            if memory is not None:
                snapshots = Snapshots(config.checkpoint, memory, journal, fence.check)
                stack.callback(snapshots.close)
                snapshots.reserve(state)
            stamp = {"corpus": data.fingerprint, "origin": program.origin}
            saving = Saving(config.checkpoint, storage, journal, stamp, snapshots)
            ledger = Ledger(
                directory,
                epoch=fence.epoch or 0,
                process=world.process,
                processes=world.processes,
                enabled=config.logging.ledger,
                allowed=fence.check,
            )
            pace = Pace(config.checkpoint.every, directory, journal, agreed)
            run = Run(config, program, data, directory, world, journal, saving, stop, progress, ledger, pace, metrics)
            if config.islands:
                network = joined(whole, program, journal, corpus=data.fingerprint, alive=run.waits)
                run.meetings = stack.enter_context(network)
            return run.go(state, start)
        except (Preempted, Fenced, KeyboardInterrupt):
            raise
        except BaseException as error:
            with suppress(UserError):  # a full disk must not hide what happened
                journal.record("failure", error=type(error).__name__, message=str(error)[:500])
            raise


def check_keepers(checkpoint: CheckpointConfig, world: World) -> None:
    """Raise UserError where snapshots are to be protected and nobody is there to do it."""
    if checkpoint.parity != "none" and world.hosts is None:
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


@dataclass
class Run:
    """The loop and what it holds on to."""

    config: RunConfig
    program: Program
    data: Data
    directory: Path
    world: World
    journal: Journal
    saving: Saving
    stop: StopRequest
    progress: Progress
    ledger: Ledger
    pace: Pace
    metrics: list[Metric]  # the user's, of answers
    meetings: Meetings | None = None  # of an island with the others
    reached: int = 0  # updates done

    def go(self, state: TrainState, start: int) -> Summary:
        """Compile, train, evaluate, report."""
        config, program = self.config, self.program
        began = time.monotonic()
        step = program.compiled_step()
        self.meet = self.meetings or program.compiled_meetings()
        evaluation = program.compiled_evaluation() if self.data.held_out else None
        self.journal.record("compile", seconds=time.monotonic() - began)
        made = plan.make_plan(program, step)
        if self.world.first:
            self.data.tokenizer.save(self.directory)
            if config.model.origin is not None and config.data.tokenizer.file == config.model.origin:
                copy_companions(config.model.origin, self.directory)
            if config.data.chats and self.data.template is not None:
                (self.directory / "chat_template.jinja").write_text(self.data.template.source, encoding="utf-8")
            write_json(self.directory / "plan.json", made)
            write_json(self.directory / "environment.json", environment.describe(config, self.data, program.mesh))
        with ExitStack() as stack:
            self.bar = stack.enter_context(
                open_progress(config.steps, start, self.world.first, every=config.logging.every)
            )
            self.bar.note(plan.render(made))
            self.sinks = [stack.enter_context(closing(sink)) for sink in self.opened_sinks(start)]
            self.meter = Meter.of(config, made)
            self.last: dict[str, float] = {}
            self.first: dict[str, float] = {}
            if config.evaluation.start and start == 0 and evaluation is not None:
                self.evaluate(state, 0, evaluation)
                self.meter.restart()
            if self.meetings and start < config.steps:
                state, start = self.meetings.begin(state, start)
            state = self.whole_loop(state, start, step, evaluation)
            self.progress.report(config.steps, "finish")
            if config.steps > start or config.steps not in self.saving.storage.steps:
                self.saving.last(state, config.steps, samples=config.steps * config.data.global_batch)
            if evaluation is not None:
                self.evaluate(state, config.steps, evaluation)
            if self.meetings:
                self.meetings.finish(state, config.steps)
        self.saving.finish()
        if program.staging is not None and config.pipeline.measure:
            self.time_ops(state)
        self.journal.record("finish", step=config.steps, **self.last)
        if self.world.first:
            write_report(self.directory)
        return Summary(self.directory, config.steps, self.last, self.first)

    def time_ops(self, state: TrainState) -> None:
        """Measure the ops of the pipeline, for the report."""
        self.progress.report(self.config.steps, "measure")
        with closing(self.batches(0)) as feed:
            batch = to_devices(next(feed), self.config, self.program.mesh)
        if replicas := self.program.replicas:  # all do the same, and no time depends on the numbers
            batch = jax.jit(lambda batch: {field: leaf[0] for field, leaf in replicas.parts(batch).items()})(batch)
        costs = op_times(self.program, self.program.evaluated(state), state.frozen, batch)
        staging = self.program.staging
        measured = {
            "schedule": staging.table.name,
            "devices": staging.table.devices,
            "repeats": staging.repeats,
            "costs": costs.model_dump(mode="json"),
        }
        if self.world.first:
            write_json(self.directory / "pipeline.json", measured)

    def whole_loop(self, state: TrainState, start: int, step: Any, evaluation: Any) -> TrainState:
        """`loop` to the end, from wherever the other islands are."""
        while True:
            try:
                return self.loop(state, start, step, evaluation)
            except Moved as moved:
                state, start = moved.state, moved.step

    def waits(self, phase: str) -> None:
        """Tell the supervisor that nothing hangs."""
        self.progress.report(self.reached, phase)

    def settled(self, state: TrainState) -> TrainState:
        """`state` when what is under way between islands has been used."""
        return self.meetings.settled(state) if self.meetings else state

    def loop(self, state: TrainState, start: int, step: Any, evaluation: Any) -> TrainState:
        """From update `start` to the last; metrics are read one step behind."""
        config = self.config
        profile = Profile(config.logging.profile, self.directory)
        pending = None
        first_row = local_rows(config, self.program.mesh).start
        self.ledger.began(start)
        self.pace.began(start)
        with closing(self.batches(start)) as feed:
            for number in range(start + 1, config.steps + 1):
                with profile.step(number):
                    self.progress.enters("input")
                    with self.meter.host():
                        rows = next(feed)
                        self.ledger.fed(number, rows, first=(number - 1) * config.data.global_batch + first_row)
                        batch = to_devices(rows, config, self.program.mesh)
                    self.progress.enters(WAIT)
                    state, metrics = step(state, batch)
                    state = self.meet(state, number)
                    self.told(pending)
                    pending = (number, metrics)
                self.reached = number - 1
                self.progress.report(self.reached)  # whose metrics have been read: it is done
                self.progress.enters("host")
                self.saving.poll()
                stopping = self.stop.requested(number) and number < config.steps
                pauses = (config.checkpoint.memory_every, config.evaluation.every)
                if stopping or self.pace.due(number) or any(self.due(every, number) for every in pauses):
                    self.progress.enters(WAIT)
                    self.told(pending)  # what is saved or evaluated has been judged, and its row stands before theirs
                    pending = None
                    state = self.settled(state)
                    self.pause(state, number, evaluation, stopping=stopping)
                    self.meter.restart()
            self.told(pending)
        return self.settled(state)

    def pause(self, state: TrainState, number: int, evaluation: Any, *, stopping: bool) -> None:
        """What happens between update `number` and the next. Raises Preempted, the state saved, where asked to stop."""
        self.progress.report(number, "save or evaluate")
        self.progress.enters("save or evaluate")
        checkpoint = self.config.checkpoint
        samples = number * self.config.data.global_batch
        if stopping:
            self.saving.last(state, number, samples=samples)
            self.saving.finish()
            self.journal.record("preempted", step=number)
            raise Preempted(f"stopped after step {number}, state saved; run the same command to go on")
        storage = self.pace.due(number) and number < self.config.steps
        memory = self.due(checkpoint.memory_every, number)
        if storage or memory:
            self.saving.begin(state, number, samples=samples, storage=storage, memory=memory)
        if storage:
            self.pace.saved(number)
        if evaluation is not None and self.due(self.config.evaluation.every, number):
            self.evaluate(state, number, evaluation)

    def opened_sinks(self, start: int) -> list[Sink]:
        """Where metrics go; only the first process writes them."""
        if not self.world.first:
            return []
        config = self.config
        return open_sinks(
            config.logging,
            self.directory,
            run_name=config.name,
            resume_step=start,
            config=config.model_dump(mode="json"),
        )

    def due(self, every: int, step: int) -> bool:
        """Whether what happens `every` so many steps (0: never) happens after `step`; the last step has its own."""
        return every > 0 and step % every == 0 and step < self.config.steps

    def batches(self, start: int) -> Iterator[dict[str, Any]]:
        """This process's rows of every global batch from update `start` on."""
        rows, size, first = local_rows(self.config, self.program.mesh), self.config.data.global_batch, 0
        if isinstance(island := self.program.replicas, Island):  # its own part of what all of them read
            first, size = island.number * size, island.count * size
        return batches(
            self.data.train,
            start=start * size,
            global_batch=size,
            rows=slice(first + rows.start, first + rows.stop),
            prefetch=self.config.data.prefetch,
        )

    def told(self, pending: tuple[int, dict[str, jax.Array]] | None) -> None:
        """Wait for a step's metrics; act on numbers that are not; log every `logging.every`-th and the first."""
        if pending is None:
            return
        step, arrays = pending
        metrics = on_host(arrays)  # waits for the device
        self.ledger.applied(step)
        with self.meter.host():
            metrics |= self.meter.lap() | self.saving.row()
            if self.meetings:
                metrics |= self.meetings.measured(step)
            elif self.program.traffic:
                metrics["sent_bytes"] = sent(self.program.traffic, step)
            self.last |= metrics
            if metrics["skipped"]:
                self.journal.record("skip", step=step, loss=metrics["loss"], grad_norm=metrics["grad_norm"])
                finite = math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"])
                if self.config.logging.on_nan == "stop" and not finite:
                    raise MeshwrightError(
                        f"step {step}: loss {metrics['loss']}, gradient norm {metrics['grad_norm']}; the update was "
                        "not applied. Lower optimizer.learning_rate, set optimizer.clip, or logging.on_nan=skip"
                    )
            self.bar.update(step, metrics)
            if step % self.config.logging.every == 0 or step in (1, self.config.steps):
                self.write(step, metrics)

    def write(self, step: int, values: dict[str, float]) -> None:
        """One row of metrics to every sink."""
        for sink in self.sinks:
            sink.write(step, values)

    def evaluate(self, state: TrainState, step: int, evaluation: Any) -> None:
        """Held-out loss and samples, of the parameters that the run stands for."""
        began = time.monotonic()
        params = self.program.evaluated(state)
        values = evaluate(self.program, evaluation, params, state.frozen, self.data)
        if isinstance(self.program.replicas, Replicas):
            values |= self.program.replicas.apart(state)
        measured, samples = self.written(combine(params, without_teacher(state.frozen)), step)
        values |= measured
        if step == 0:
            self.first = dict(values)
        self.last |= values
        self.write(step, values)
        self.journal.record("evaluation", step=step, seconds=time.monotonic() - began, **values)
        self.bar.note(f"step {step}: " + ", ".join(f"{name} {value:.4f}" for name, value in values.items()))
        for prompt, text in samples:
            self.journal.record("sample", step=step, prompt=prompt, text=text)
            if step in (0, self.config.steps):
                self.bar.note(f"step {step}, after {prompt!r}:\n{text}")

    def written(self, params: Any, step: int) -> tuple[dict[str, float], list[tuple[str, str]]]:
        """What the model writes: measures of its answers, and its samples. Only where one process has it all."""
        config, prompts = self.config.evaluation, self.config.evaluation.prompts
        if not (prompts or config.answers) or jax.process_count() > 1:
            return {}, []
        weights = self.program.in_order(params)
        texts = complete(
            self.program,
            weights,
            self.data.tokenizer,
            prompts,
            template=self.data.template if self.config.data.chats else None,
            max_tokens=config.sample_tokens,
            sampling=Sampling(temperature=config.temperature),
            seed=self.config.seed,
        )
        values = answered(self.program, weights, self.data, config, self.metrics)
        return values, list(zip(prompts, texts, strict=True))
