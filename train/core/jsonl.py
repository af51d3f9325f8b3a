"""Files of one JSON object a line, that survive being killed at any byte.

A line is written by one system call, so a killed process leaves at most a torn last line: `mend` cuts it off before the
next line is appended, and `read` skips it. JSON has no NaN and no infinity, and runs do: they travel as the strings
"NaN", "Infinity" and "-Infinity" (as in protobuf's JSON mapping), which `float` reads back.
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

KEPT = 100_000  # lines that wait for a disk

logger = logging.getLogger(__name__)


class Lines:
    """A file of lines that are appended as they come.

    A disk that refuses a later one (it is full, errs, or has become read-only) stops nobody: lines are kept, and
    written before the next one that it takes. The oldest of more than `KEPT` are lost.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._good = False  # a line has been written
        self._kept: deque[bytes] = deque(maxlen=KEPT)

    def append(self, row: Mapping[str, Any], *, sync: bool) -> None:
        """Add `row` as the last line; `sync` waits until it is on the disk. Raises UserError where the first is not."""
        told = bool(self._kept)
        self._kept.append(encoded(row))
        try:
            write(self.path, b"".join(self._kept), sync=sync)
        except OSError as error:
            if not self._good:
                raise unwritable(self.path, error) from error
            if not told:
                logger.warning("%s: cannot be written: %s; its lines wait until it can be", self.path, error.strerror)
            return
        self._good = True
        self._kept.clear()


def append(path: Path, row: Mapping[str, Any], *, sync: bool) -> None:
    """Add `row` as the last line of `path`; `sync` waits until it is on the disk.

    Raises UserError where the file cannot be written (a full disk, a directory that is read-only).
    """
    Lines(path).append(row, sync=sync)


def write(path: Path, text: bytes, *, sync: bool) -> None:
    """Append `text`, all of it or nothing. Raises OSError."""
    with path.open("ab", buffering=0) as file:
        before = file.tell()
        try:
            if file.write(text) < len(text):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if sync:
                os.fsync(file.fileno())
        except OSError:
            with suppress(OSError):
                file.truncate(before)
            raise


def replace(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Let `path` hold `rows` and nothing else, whole or not at all. Raises UserError where it cannot be written."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        draft.write_bytes(b"".join(map(encoded, rows)))
        os.replace(draft, path)
    except OSError as error:
        raise unwritable(path, error) from error


def mend(path: Path) -> None:
    """Cut off a torn last line; give a whole one that lacks its newline what it lacks. A missing file is whole.

    Raises UserError where the file would have to be written and cannot be.
    """
    if not path.exists():
        return
    try:
        content = path.read_bytes()
        if not (tail := content[content.rfind(b"\n") + 1 :]):
            return
        with path.open("rb+") as file:
            if decoded(tail) is None:
                file.truncate(len(content) - len(tail))
            else:
                file.seek(0, os.SEEK_END)
                file.write(b"\n")
    except OSError as error:
        raise unwritable(path, error) from error


def read(path: Path) -> list[dict[str, Any]]:
    """Every whole line of `path`, in order; a torn last line is skipped in silence, any other with a warning.

    A missing file has no lines.
    """
    if not path.exists():
        return []
    rows = []
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        row = decoded(line)
        if row is not None:
            rows.append(row)
        elif line.strip() and number < len(lines):
            logger.warning("%s, line %d is not a JSON object; skipped: %.80r", path, number, line)
    return rows


def encoded(row: Mapping[str, Any]) -> bytes:
    """One line of JSON, newline included."""
    return json.dumps(portable(row), default=str, allow_nan=False).encode() + b"\n"


def decoded(line: bytes) -> dict[str, Any] | None:
    """The object on `line`, None where there is none."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def portable(value: Any) -> Any:
    """`value` with numbers that JSON lacks as strings, NumPy scalars as numbers, and keys as text."""
    if isinstance(value, Mapping):
        return {str(key): portable(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [portable(inner) for inner in value]
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def unwritable(path: Path, error: OSError) -> UserError:
    """What to tell the user about a file that cannot be written."""
    return UserError(f"{path}: cannot be written: {error.strerror}; make room or choose another place, then go on")
