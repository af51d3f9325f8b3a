"""The cache directory: an entry is complete or absent, and one process writes it while the others wait.

    CACHE/tokenizers/KEY/   a trained tokenizer
    CACHE/tokens/KEY/       a tokenized source
    CACHE/streams/KEY/      the windows of a streamed source that were read so far
    CACHE/datasets/         Arrow files of the datasets library

An entry is a directory. Its `digests.json` has a checksum of each other file, which is compared at every read.
"""

import errno
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import xxhash
from filelock import FileLock

from ...configs.errors import MeshwrightError, UserError

logger = logging.getLogger(__name__)
Entry = TypeVar("Entry")


class CorruptEntry(MeshwrightError):
    """A cache entry differs from what was written. It is never used; `cache_entry` writes it again."""


def cache_directory(configured: str | None) -> Path:
    """`data.cache`, else $MESHWRIGHT_CACHE, else .cache/meshwright in the working directory."""
    directory = configured or os.environ.get("MESHWRIGHT_CACHE") or Path(".cache", "meshwright")
    return Path(directory).expanduser().absolute()


def cache_entry(entry: Path, *, read: Callable[[Path], Entry], write: Callable[[Path], None]) -> Entry:
    """Return `read(entry)`; `write(directory)` makes the entry first where it is missing or corrupt.

    `write` fills a temporary directory, which is renamed to the entry when it is complete. Processes on one machine, or
    on one file system with locks, take turns. Raises UserError on a full disk or a directory that cannot be written.
    """
    try:
        if not _intact(entry, warn=True):
            entry.parent.mkdir(parents=True, exist_ok=True)
            # A kernel lock ends with the process that holds it; a lock file would outlive it.
            with FileLock(entry.with_name(entry.name + ".lock"), fallback_to_soft=False):
                if not _intact(entry, warn=False):  # no other process wrote it while this one waited
                    _replace(entry, write)
    except OSError as error:
        reason = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else str(error)
        raise UserError(
            f"data.cache: {entry.parent} cannot be written: {reason}; set data.cache to another directory"
        ) from error
    return read(entry)


def verify(entry: Path) -> None:
    """Raise CorruptEntry when a file of the entry is missing or differs from what was written."""
    try:
        digests = json.loads((entry / "digests.json").read_text())
        changed = [name for name, digest in digests.items() if file_digest(entry / name) != digest]
    except (OSError, ValueError, AttributeError) as error:
        raise CorruptEntry(f"{entry} is incomplete ({error})") from error
    if changed:
        raise CorruptEntry(f"{entry}: {', '.join(changed)} changed since it was written")


def seal(entry: Path) -> None:
    """Write the checksums of all files in `entry`."""
    digests = {file.name: file_digest(file) for file in sorted(entry.iterdir())}
    (entry / "digests.json").write_text(json.dumps(digests, indent=2))


def file_digest(path: Path) -> str:
    """A 128-bit hash of a file's content, in hexadecimal."""
    state = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            state.update(block)
    return state.hexdigest()


def _intact(entry: Path, *, warn: bool) -> bool:
    if not entry.is_dir():
        return False
    try:
        verify(entry)
    except CorruptEntry as error:
        if warn:
            logger.warning("cache: %s; writing it again", error)
        return False
    return True


def _replace(entry: Path, write: Callable[[Path], None]) -> None:
    unfinished = Path(tempfile.mkdtemp(prefix=entry.name + ".", suffix=".tmp", dir=entry.parent))
    try:
        write(unfinished)
        seal(unfinished)
        shutil.rmtree(entry, ignore_errors=True)
        os.rename(unfinished, entry)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
