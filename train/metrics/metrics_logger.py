"""Publishes a session's metrics to sinks, progress display and event log.

with MetricsLogger(config, directory, event_log, start=start) as logger:
    logger.log_step(1, metrics)
    logger.log_evaluation(100, values, samples, seconds=2.0)
logger.latest, logger.initial     the newest value of every metric; the evaluation before the first step
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

from ...configs.run import RunConfig
from ..core.event_log import EventLog
from .metric_sinks import Sink, open_sinks
from .progress_display import open_progress


class MetricsLogger:
    """Publishes metrics in the process whose `event_log` is enabled; in others the same calls publish nothing."""

    def __init__(self, config: RunConfig, directory: Path, event_log: EventLog, *, start: int) -> None:
        self._config, self._directory, self._event_log, self._start = config, directory, event_log, start
        self._stack = ExitStack()
        self._sinks: list[Sink] = []
        self.latest: dict[str, float] = {}
        self.initial: dict[str, float] = {}

    def __enter__(self) -> "MetricsLogger":
        config, enabled = self._config, self._event_log.enabled
        progress = open_progress(config.steps, self._start, enabled, interval=config.logging.every)
        self._progress = self._stack.enter_context(progress)
        if enabled:
            self._sinks = open_sinks(
                config.logging,
                self._directory,
                run_name=config.name,
                resume_step=self._start,
                config=config.model_dump(mode="json", exclude={"seed"} if config.privacy else None),
            )
        for sink in self._sinks:
            self._stack.enter_context(closing(sink))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def note(self, text: Any) -> None:
        """Show `text` once in the progress display."""
        self._progress.note(text)

    def log_step(self, number: int, metrics: Mapping[str, float]) -> None:
        """Publish the metrics of update `number`: a row for multiples of `logging.every`, the first and the last."""
        self.latest |= metrics
        if metrics["skipped"]:
            self._event_log.record("skip", step=number, loss=metrics["loss"], grad_norm=metrics["grad_norm"])
        self._progress.update(number, metrics)
        if number % self._config.logging.every == 0 or number in (1, self._config.steps):
            self._row(number, metrics)

    def log_evaluation(
        self, step: int, values: Mapping[str, float], samples: Sequence[tuple[str, str]], *, seconds: float
    ) -> None:
        """Publish held-out metrics, and (prompt, text) samples, after `step` updates."""
        if step == 0:
            self.initial = dict(values)
        self.latest |= values
        self._row(step, values)
        self._event_log.record("evaluation", step=step, seconds=seconds, **values)
        self.note(f"step {step}: " + ", ".join(f"{name} {value:.4f}" for name, value in values.items()))
        for prompt, text in samples:
            self._event_log.record("sample", step=step, prompt=prompt, text=text)
            if step in (0, self._config.steps):
                self.note(f"step {step}, after {prompt!r}:\n{text}")

    def log_preemption(self, step: int) -> None:
        """Record that the session stopped on request after `step`, with its state saved."""
        self._event_log.record("preempted", step=step)

    def _row(self, step: int, values: Mapping[str, float]) -> None:
        for sink in self._sinks:
            sink.write(step, values)
