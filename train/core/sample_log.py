"""Which samples each process fed to which step: `ledger/PROCESS.jsonl`, one line a step that is done. JAX-free.

    ledger = Ledger(directory, epoch=3, process=1, processes=4)
    ledger.began(40)                       this sitting goes on from step 40
    ledger.fed(41, batch, first=656)       rows 656, 657, ... of the data, as they are handed to the device
    ledger.applied(41)                     the step is done: the line is written

`logging.ledger` turns it on; `audit.py` reads it. A row is told by its fingerprint, so what is compared is what was
fed, not what ought to have been.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from .jsonl import Lines, mend, read

FOLDER = "ledger"


class Ledger:
    """One process's part of the ledger of the run in `directory`; `allowed` raises where it may write no more."""

    def __init__(
        self,
        directory: Path,
        *,
        epoch: int,
        process: int,
        processes: int,
        enabled: bool,
        allowed: Callable[[], None] = lambda: None,
    ) -> None:
        self._path = directory / FOLDER / f"{process}.jsonl"
        self._head = {"epoch": epoch, "processes": processes}
        self._enabled, self._allowed = enabled, allowed
        self._lines = Lines(self._path)
        self._fed: dict[int, dict[str, Any]] = {}  # steps on their way
        if enabled:
            self._path.parent.mkdir(exist_ok=True)
            mend(self._path)

    def began(self, step: int) -> None:
        """The sitting goes on from `step` updates."""
        self._write({"from": step})

    def fed(self, step: int, batch: Mapping[str, np.ndarray], *, first: int) -> None:
        """Rows of `batch` [rows, sequence], number `first` and following of the data, are this process's share."""
        if self._enabled:
            rows = zip(batch["tokens"], batch["targets"], strict=True)
            self._fed[step] = {"first": first, "rows": [fingerprint(*row) for row in rows]}

    def applied(self, step: int) -> None:
        """The update number `step` is done."""
        if self._enabled:
            self._write({"step": step, **self._fed.pop(step)})

    def _write(self, row: Mapping[str, Any]) -> None:
        if self._enabled:
            self._allowed()
            self._lines.append({**self._head, **row}, sync=False)


def fingerprint(tokens: np.ndarray, targets: np.ndarray) -> str:
    """What tells a row from another one."""
    seen = xxhash.xxh3_64(np.ascontiguousarray(tokens).tobytes())
    seen.update(np.ascontiguousarray(targets).tobytes())
    return seen.hexdigest()


def read_ledger(directory: Path) -> dict[int, list[dict[str, Any]]]:
    """Process -> its lines, oldest first; nothing where the run kept no ledger."""
    files = sorted((directory / FOLDER).glob("*.jsonl"), key=lambda file: int(file.stem))
    return {int(file.stem): read(file) for file in files}
