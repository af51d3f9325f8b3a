"""JSON Lines files (one JSON object a line) that survive a process killed at any byte.

A line is written by one system call, so a killed process leaves at most a torn last line: `repair_last_line` cuts it
off before the next line is appended, and `read_rows` skips it. JSON has no NaN and no infinity; they are written as the
strings "NaN", "Infinity" and "-Infinity" (as in protobuf's JSON mapping), which `float` reads back.
"""

import errno
import json
import logging
import math
import os
from collections import deque
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ...configs.errors import UserError

MAX_PENDING_LINES = 100_000  # lines held in memory while the disk refuses them

logger = logging.getLogger(__name__)


class LineWriter:
    """Appends rows to a file.

    The first row must succeed. If the disk refuses a later row (it is full, fails, or became read-only), the run goes
    on: rows are held in memory and written before the next row that succeeds. Beyond `MAX_PENDING_LINES` the oldest
    are lost.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._has_written = False
        self._pending: deque[bytes] = deque(maxlen=MAX_PENDING_LINES)

    def append(self, row: Mapping[str, Any], *, sync: bool) -> None:
        """Add `row` as the last line; `sync` waits until it is on the disk. Raises UserError if the first row fails."""
        warned = bool(self._pending)
        self._pending.append(encode_row(row))
        try:
            append_bytes(self.path, b"".join(self._pending), sync=sync)
        except OSError as error:
            if not self._has_written:
                raise write_error(self.path, error) from error
            if not warned:
                logger.warning(
                    "%s cannot be written: %s; its lines are held in memory until it can be", self.path, error.strerror
                )
            return
        self._has_written = True
        self._pending.clear()


def append_bytes(path: Path, text: bytes, *, sync: bool) -> None:
    """Append `text` to `path`, all of it or nothing. Raises OSError if it cannot be written."""
    with path.open("ab", buffering=0) as file:
        size = file.tell()
        try:
            if file.write(text) < len(text):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if sync:
                os.fsync(file.fileno())
        except OSError:
            with suppress(OSError):
                file.truncate(size)
            raise


def replace_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Replace the content of `path` by `rows`, atomically. Raises UserError if it cannot be written."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        draft.write_bytes(b"".join(map(encode_row, rows)))
        os.replace(draft, path)
    except OSError as error:
        raise write_error(path, error) from error


def repair_last_line(path: Path) -> None:
    """Cut off a torn last line; add the newline that a complete last line lacks. A missing file needs no repair.

    Raises UserError if the file needs a repair and cannot be written.
    """
    if not path.exists():
        return
    try:
        content = path.read_bytes()
        if not (tail := content[content.rfind(b"\n") + 1 :]):
            return
        with path.open("rb+") as file:
            if decode_row(tail) is None:
                file.truncate(len(content) - len(tail))
            else:
                file.seek(0, os.SEEK_END)
                file.write(b"\n")
    except OSError as error:
        raise write_error(path, error) from error


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of `path`, in order; empty if there is no file.

    A torn last line is skipped silently, any other line that is not a JSON object with a warning.
    """
    if not path.exists():
        return []
    rows = []
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        row = decode_row(line)
        if row is not None:
            rows.append(row)
        elif line.strip() and number < len(lines):
            logger.warning("%s, line %d is not a JSON object; skipped: %.80r", path, number, line)
    return rows


def encode_row(row: Mapping[str, Any]) -> bytes:
    """Return `row` as one line of JSON, newline included."""
    return json.dumps(to_json_value(row), default=str, allow_nan=False).encode() + b"\n"


def decode_row(line: bytes) -> dict[str, Any] | None:
    """Return the JSON object on `line`; None if it is not one."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def to_json_value(value: Any) -> Any:
    """Convert `value` to what JSON can hold: NaN and infinities become strings, NumPy scalars numbers, keys strings."""
    if isinstance(value, Mapping):
        return {str(key): to_json_value(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [to_json_value(inner) for inner in value]
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def write_error(path: Path, error: OSError) -> UserError:
    """Return the UserError for a file that cannot be written."""
    return UserError(f"{path} cannot be written: {error.strerror}; make room or choose another place, and run again")
