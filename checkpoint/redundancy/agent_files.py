"""What keepers and trainers of a host tell each other: small files beside the slots, replaced whole. JAX-free.

protected.json      the keeper: the newest step that every group of hosts protects, and what that took
recovery.json       the keeper, before the trainers start: what was found, and what was rebuilt from parity
"""

import contextlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import xxhash

PROTECTED, RECOVERY = "protected.json", "recovery.json"
PARITY_GLOB = "parity.[01]"
MEMORY_VARIABLE = "MESHWRIGHT_MEMORY"  # of the environment: a directory in a file system that lives in memory


@dataclass(frozen=True)
class Protected:
    """The newest protected step; -1: none."""

    step: int = -1
    seal: str = ""  # of this host's snapshot of it
    seconds: float = 0.0  # from the snapshot being whole on every host of the group to its parity being whole
    bytes: int = 0  # of parity, on this host


@dataclass(frozen=True)
class Recovery:
    """What a sitting can go on from in memory."""

    step: int  # -1: nothing
    rebuilt: tuple[int, ...] = ()  # hosts whose snapshots were rebuilt from parity
    note: str = ""  # what was lost and rebuilt, or why nothing can be had
    damaged: tuple[str, ...] = ()  # slots that were not what was written
    seconds: float = 0.0  # that checking and rebuilding took


def write_status(directory: Path, word: Protected | Recovery) -> None:
    """Replace the word of this kind."""
    name = PROTECTED if isinstance(word, Protected) else RECOVERY
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    draft = directory / f".{name}.{os.getpid()}"
    draft.write_text(json.dumps(asdict(word)))
    os.replace(draft, directory / name)


def read_protected(directory: Path) -> Protected:
    """The keeper's last word; nothing is protected where it said none."""
    told = _read(directory / PROTECTED)
    return Protected(**told) if told else Protected()


def read_recovery(directory: Path) -> Recovery | None:
    """What the keeper said before this sitting; None where there is no keeper."""
    told = _read(directory / RECOVERY)
    return recovery_from_json(told) if told else None


def recovery_from_json(told: dict) -> Recovery:
    """A recovery from JSON."""
    return Recovery(told["step"], tuple(told["rebuilt"]), told["note"], tuple(told["damaged"]), told["seconds"])


def files(directory: Path) -> list[Path]:
    """Everything a keeper leaves."""
    return [*directory.glob(PARITY_GLOB), *directory.glob("*.json"), *directory.glob(".*"), *directory.glob("*.draft")]


def remove_leftovers(directory: Path) -> None:
    """Delete what a keeper left in a directory without snapshots."""
    if not directory.is_dir() or any(directory.glob("[0-9]*.[01]")):
        return
    for path in files(directory):
        path.unlink(missing_ok=True)
    for place in (directory, directory.parent):
        with contextlib.suppress(OSError):  # another host's is still there
            place.rmdir()


def memory_directory(run: Path, *, host: int) -> Path:
    """Where the slots of a host are: where this machine's environment says (`PLACE`), else in /dev/shm where the system
    has it. Hosts simulated on one machine differ.
    """
    base = Path(os.environ.get(MEMORY_VARIABLE) or ("/dev/shm" if Path("/dev/shm").is_dir() else run / "memory"))
    return base / f"meshwright-{os.getuid()}" / xxhash.xxh3_64_hexdigest(str(run.absolute()).encode()) / f"host-{host}"


def _read(file: Path) -> dict | None:
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):
        return None
