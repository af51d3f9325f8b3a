"""Sample log: which rows each process fed to each step, one line per finished step. JAX-free.

    log = SampleLog(directory, epoch=3, process=1, processes=4, enabled=True)     ledger/1.jsonl
    log.record_start(40)                       this session goes on from step 40
    log.record_rows(41, batch, first=656)      rows 656, 657, ... of the data, as they are handed to the device
    log.record_update(41)                      the step is done: the line is written

`logging.ledger` turns it on; `train/report/run_audit.py` reads it. Rows are identified by fingerprints of their
content, so the audit compares what was fed, not what should have been fed.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from .jsonl import LineWriter, read_rows, repair_last_line

FOLDER = "ledger"


class SampleLog:
    """Writes the sample log of one process. `check_allowed` raises if this process may no longer write."""

    def __init__(
        self, directory: Path, *, epoch: int, process: int, processes: int, enabled: bool,
        check_allowed: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        self._path = directory / FOLDER / f"{process}.jsonl"
        self._head = {"epoch": epoch, "processes": processes}
        self._enabled, self._check_allowed = enabled, check_allowed
        self._lines = LineWriter(self._path)
        self._unfinished: dict[int, dict[str, Any]] = {}  # step -> its rows
        if enabled:
            self._path.parent.mkdir(exist_ok=True)
            repair_last_line(self._path)

    def record_start(self, step: int) -> None:
        """Record that the session goes on from `step` updates."""
        self._write({"from": step})

    def record_rows(self, step: int, batch: Mapping[str, np.ndarray], *, first: int) -> None:
        """Note the rows of `batch`, each value [rows, sequence]: rows `first`, `first` + 1, ... of the data."""
        if self._enabled:
            rows = zip(batch["tokens"], batch["targets"], strict=True)
            self._unfinished[step] = {"first": first, "rows": [row_fingerprint(*row) for row in rows]}

    def record_update(self, step: int) -> None:
        """Write the line of update number `step`, which is done."""
        if self._enabled:
            self._write({"step": step, **self._unfinished.pop(step)})

    def _write(self, row: Mapping[str, Any]) -> None:
        if self._enabled:
            self._check_allowed()
            self._lines.append({**self._head, **row}, sync=False)


def row_fingerprint(tokens: np.ndarray, targets: np.ndarray) -> str:
    """Return the xxh3 of a row's tokens and targets, 16 hexadecimal digits."""
    return xxhash.xxh3_64_hexdigest(np.ascontiguousarray(tokens).tobytes() + np.ascontiguousarray(targets).tobytes())


def read_sample_log(directory: Path) -> dict[int, list[dict[str, Any]]]:
    """Return process -> its rows, oldest first; empty if the run wrote no sample log."""
    files = sorted((directory / FOLDER).glob("*.jsonl"), key=lambda file: int(file.stem))
    return {int(file.stem): read_rows(file) for file in files}
