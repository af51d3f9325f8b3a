"""Metric sinks: metrics.jsonl always, TensorBoard and Weights & Biases if configured.

A run may be killed after it logged steps that its newest checkpoint does not have. Resumed at step s, it computes them
again; so every sink drops the rows after s, and has each step once.
"""

import contextlib
import importlib.util
import logging
import secrets
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from ...configs.errors import UserError
from ...configs.sections.training import LoggingConfig
from ..core import jsonl
from ..core.event_log import METRICS

FLUSH = 20.0  # seconds between two writes of TensorBoard's files
# Metrics in the chart group speed/ of TensorBoard and Weights & Biases; others are in train/ or held_out/.
SPEED = ("tokens_per_second", "step_seconds", "host_seconds", "mfu")

logger = logging.getLogger(__name__)


class Sink(Protocol):
    """Receives metrics by name. Steps come in order; the values of an evaluation come in a call of their own."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Write the `values` of `step`."""

    def close(self) -> None:
        """Close files and connections; nothing is written afterwards."""


def open_sinks(
    logging: LoggingConfig, directory: Path, *, run_name: str, resume_step: int, config: dict[str, Any]
) -> list[Sink]:
    """Open the sinks that `logging` names, for the run in `directory`. Call it on the first process only.

    `resume_step` is the step of the restored state, 0 for a new run; `config` is the resolved configuration. Raises
    UserError if a package is missing, before any file is changed.
    """
    check_sinks(logging)
    sinks: list[Sink] = [JsonLines(directory / METRICS, resume_step=resume_step)]
    if logging.tensorboard:
        sinks.append(TensorBoard(directory / "tensorboard", resume_step=resume_step))
    if logging.wandb is not None:
        sinks.append(WeightsAndBiases(logging.wandb, directory=directory, run_name=run_name, config=config))
    return sinks


def check_sinks(logging: LoggingConfig) -> None:
    """Raise UserError if `logging` needs a package that is not installed. Needs no run directory."""
    if logging.wandb is not None and importlib.util.find_spec("wandb") is None:
        raise UserError(
            f"logging.wandb: {logging.wandb} needs the package wandb, which is not installed; "
            "pip install 'meshwright[wandb]', or set logging.wandb=null"
        )


class JsonLines:
    """`metrics.jsonl`, a line `{"step": 10, "loss": 7.31, ...}` each. Drops rows of steps after `resume_step`."""

    def __init__(self, path: Path, *, resume_step: int = 0) -> None:
        self.path = path
        jsonl.replace_rows(path, [row for row in jsonl.read_rows(path) if row.get("step", 0) <= resume_step])
        self._lines = jsonl.LineWriter(path)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Append a row. `LineWriter` says what happens if the disk is full."""
        self._lines.append({"step": step, **values}, sync=False)

    def close(self) -> None:
        """Do nothing: no file is open between two rows."""


class TensorBoard:
    """Event files in `directory`. TensorBoard hides steps after `resume_step` that an older file there has.

    They are written on the caller's thread: the thread of `SummaryWriter` dies if the disk refuses a record, and then
    blocks the writer for ever. Here the charts end, with a warning, and the run continues.
    """

    def __init__(self, directory: Path, *, resume_step: int = 0) -> None:
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import SessionLog

        directory.mkdir(parents=True, exist_ok=True)
        self._events, self._flushed = EventsWriter(str(directory / "events")), 0.0
        self._add(resume_step + 1, session_log=SessionLog(status=SessionLog.START))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Write a scalar for each metric."""
        from tensorboardX.proto.summary_pb2 import Summary

        scalars = [Summary.Value(tag=tag(name), simple_value=value) for name, value in values.items()]
        self._add(step, summary=Summary(value=scalars))

    def _add(self, step: int, **fields: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event

        if self._events is None:
            return
        try:
            self._events.write_event(Event(wall_time=time.time(), step=step, **fields))
            if time.monotonic() - self._flushed > FLUSH:
                self._events.flush()
                self._flushed = time.monotonic()
        except OSError as error:
            logger.warning(
                "TensorBoard's files cannot be written any more: %s; the run continues without them", error.strerror
            )
            self._events = None

    def close(self) -> None:
        """Flush."""
        if self._events is not None:
            with contextlib.suppress(OSError):
                self._events.close()


class WeightsAndBiases:
    """A run of `project` at Weights & Biases; a resumed run continues under the id in `directory`/wandb-id.

    The server keeps the rows that it has: it drops the steps that a resumed run sends again.
    """

    def __init__(self, project: str, *, directory: Path, run_name: str, config: dict[str, Any]) -> None:
        import wandb

        id_file = directory / "wandb-id"
        if not id_file.exists():
            id_file.write_text(secrets.token_hex(4) + "\n", encoding="utf-8")
        self.run = wandb.init(
            project=project,
            name=run_name,
            id=id_file.read_text(encoding="utf-8").strip(),
            dir=str(directory),
            config=config,
            resume="allow",
        )
        # Held-out values of a step come after its training values; with an axis of our own, rows may have any order.
        self.run.define_metric("*", step_metric="step")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Send a row."""
        self.run.log({"step": step, **{tag(name): value for name, value in values.items()}})

    def close(self) -> None:
        """Wait for the upload."""
        self.run.finish()


def tag(name: str) -> str:
    """The name of a metric's chart: `train/loss`, `speed/mfu`, `held_out/loss`."""
    if name.startswith("held_out_"):
        return "held_out/" + name.removeprefix("held_out_")
    return ("speed/" if name in SPEED else "train/") + name
