"""What a sitting says of itself while it goes: rows of metrics, the display, the journal's lines about steps.

with Telling(config, directory, journal, start=start) as told:
    told.step(1, metrics)
    told.evaluation(100, values, samples, seconds=2.0)
told.last, told.first     the newest value of every metric; the evaluation before the first step
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

from ...configs.run import RunConfig
from ..core.event_log import Journal
from .metric_sinks import Sink, open_sinks
from .progress_display import open_progress


class MetricsLogger:
    """Only the process whose `journal` is enabled is heard; the others are told the same."""

    def __init__(self, config: RunConfig, directory: Path, journal: Journal, *, start: int) -> None:
        self._config, self._directory, self._journal, self._start = config, directory, journal, start
        self._held = ExitStack()
        self._sinks: list[Sink] = []
        self.latest: dict[str, float] = {}
        self.initial: dict[str, float] = {}

    def __enter__(self) -> "MetricsLogger":
        config, heard = self._config, self._journal.enabled
        self._bar = self._held.enter_context(
            open_progress(config.steps, self._start, heard, interval=config.logging.every)
        )
        if heard:
            self._sinks = open_sinks(
                config.logging,
                self._directory,
                run_name=config.name,
                resume_step=self._start,
                config=config.model_dump(mode="json", exclude={"seed"} if config.privacy else None),
            )
        for sink in self._sinks:
            self._held.enter_context(closing(sink))
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    def note(self, text: Any) -> None:
        """Show it once."""
        self._bar.note(text)

    def log_step(self, number: int, metrics: Mapping[str, float]) -> None:
        """Update `number` is done. Every `logging.every`-th has a row, the first and the last too."""
        self.latest |= metrics
        if metrics["skipped"]:
            self._journal.record("skip", step=number, loss=metrics["loss"], grad_norm=metrics["grad_norm"])
        self._bar.update(number, metrics)
        if number % self._config.logging.every == 0 or number in (1, self._config.steps):
            self._row(number, metrics)

    def log_evaluation(
        self, step: int, values: Mapping[str, float], samples: Sequence[tuple[str, str]], *, seconds: float
    ) -> None:
        """Numbers of what is held out, and (prompt, text) samples, after `step` updates."""
        if step == 0:
            self.initial = dict(values)
        self.latest |= values
        self._row(step, values)
        self._journal.record("evaluation", step=step, seconds=seconds, **values)
        self.note(f"step {step}: " + ", ".join(f"{name} {value:.4f}" for name, value in values.items()))
        for prompt, text in samples:
            self._journal.record("sample", step=step, prompt=prompt, text=text)
            if step in (0, self._config.steps):
                self.note(f"step {step}, after {prompt!r}:\n{text}")

    def log_preemption(self, step: int) -> None:
        """On request, the state saved."""
        self._journal.record("preempted", step=step)

    def _row(self, step: int, values: Mapping[str, float]) -> None:
        for sink in self._sinks:
            sink.write(step, values)
