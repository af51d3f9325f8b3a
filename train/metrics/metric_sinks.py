"""Where metrics go: a file of JSON lines always, TensorBoard and Weights & Biases where asked for.

A run may be killed after it logged steps that its newest checkpoint does not have. Resumed at step s it computes them
again, so every sink forgets what lies behind s: no step is told twice.
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

# Chart groups of TensorBoard and Weights & Biases; what is not named here is under train/.
FLUSH = 20.0  # seconds between two writings of TensorBoard's records
SPEED = ("tokens_per_second", "step_seconds", "host_seconds", "mfu")


logger = logging.getLogger(__name__)


class Sink(Protocol):
    """Takes metrics by name. Steps come in order, an evaluation's values in a call of their own."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Tell the `values` of `step`."""

    def close(self) -> None:
        """Let go of files and connections; nothing is written afterwards."""


def open_sinks(
    logging: LoggingConfig, directory: Path, *, run_name: str, resume_step: int, config: dict[str, Any]
) -> list[Sink]:
    """The sinks `logging` asks for, of the run in `directory`. Call it on the first process only.

    `resume_step`: last step the restored state has seen, 0 for a fresh one. `config`: the resolved configuration.
    Raises UserError where a package is missing, before any file is touched.
    """
    check_sinks(logging)
    sinks: list[Sink] = [JsonLines(directory / METRICS, resume_step=resume_step)]
    if logging.tensorboard:
        sinks.append(TensorBoard(directory / "tensorboard", resume_step=resume_step))
    if logging.wandb is not None:
        sinks.append(WeightsAndBiases(logging.wandb, directory=directory, run_name=run_name, config=config))
    return sinks


def check_sinks(logging: LoggingConfig) -> None:
    """Raise UserError where `logging` asks for a package that is not installed. Needs no run directory."""
    if logging.wandb is not None and importlib.util.find_spec("wandb") is None:
        raise UserError(
            f"logging.wandb: {logging.wandb} needs the package wandb, which is not installed; "
            "pip install 'meshwright[wandb]', or set logging.wandb=null"
        )


class JsonLines:
    """`metrics.jsonl`: `{"step": 10, "loss": 7.31, ...}` a line. Rows of steps after `resume_step` go first."""

    def __init__(self, path: Path, *, resume_step: int = 0) -> None:
        self.path = path
        jsonl.replace_rows(path, [row for row in jsonl.read_rows(path) if row.get("step", 0) <= resume_step])
        self._lines = jsonl.LineWriter(path)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Append a row. See `Lines` for where the disk does not take it."""
        self._lines.append({"step": step, **values}, sync=False)

    def close(self) -> None:
        """Nothing is open between two rows."""


class TensorBoard:
    """Event files under `directory`. TensorBoard hides steps after `resume_step` that an older file there has.

    Written on the caller's thread: `SummaryWriter`'s own dies of a disk that refuses a record, and the queue to it then
    holds whoever writes for ever. Here the charts end, with a warning, and the run goes on.
    """

    def __init__(self, directory: Path, *, resume_step: int = 0) -> None:
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import SessionLog

        directory.mkdir(parents=True, exist_ok=True)
        self._events, self._flushed = EventsWriter(str(directory / "events")), 0.0
        self._add(resume_step + 1, session_log=SessionLog(status=SessionLog.START))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One scalar a metric."""
        from tensorboardX.proto.summary_pb2 import Summary

        told = [Summary.Value(tag=tag(name), simple_value=value) for name, value in values.items()]
        self._add(step, summary=Summary(value=told))

    def _add(self, step: int, **what: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event

        if self._events is None:
            return
        try:
            self._events.write_event(Event(wall_time=time.time(), step=step, **what))
            if time.monotonic() - self._flushed > FLUSH:
                self._events.flush()
                self._flushed = time.monotonic()
        except OSError as error:
            logger.warning("TensorBoard's files cannot be written any more: %s", error.strerror)
            self._events = None

    def close(self) -> None:
        """Flush."""
        if self._events is not None:
            with contextlib.suppress(OSError):
                self._events.close()


class WeightsAndBiases:
    """A run of `project` at Weights & Biases; a resumed run goes on under the id it has in `directory`/wandb-id.

    Their server keeps what it was told: steps told again by a resumed run are dropped there, not here.
    """

    def __init__(self, project: str, *, directory: Path, run_name: str, config: dict[str, Any]) -> None:
        import wandb

        self.run = wandb.init(
            project=project,
            name=run_name,
            id=kept_identity(directory / "wandb-id"),
            dir=str(directory),
            config=config,
            resume="allow",
        )
        # Held-out values of a step come after its training values: an axis of our own takes rows in any order.
        self.run.define_metric("*", step_metric="step")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One row."""
        self.run.log({"step": step, **{tag(name): value for name, value in values.items()}})

    def close(self) -> None:
        """Wait for the upload."""
        self.run.finish()


def tag(name: str) -> str:
    """Where a metric is charted: `train/loss`, `speed/mfu`, `held_out/loss`."""
    if name.startswith("held_out_"):
        return "held_out/" + name.removeprefix("held_out_")
    return ("speed/" if name in SPEED else "train/") + name


def kept_identity(file: Path) -> str:
    """The word in `file`, made up the first time."""
    if not file.exists():
        file.write_text(secrets.token_hex(4) + "\n", encoding="utf-8")
    return file.read_text(encoding="utf-8").strip()
