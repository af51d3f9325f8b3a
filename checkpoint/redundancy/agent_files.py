"""Status files between the snapshot agent and the trainers of a host: small, beside the slots, replaced atomically.

protected.json      written by the agent: the newest step that every group of hosts protects, and what that cost
recovery.json       written by the agent before the trainers start: what can be restored, and what was rebuilt

JAX-free.
"""

import contextlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import xxhash

PROTECTED, RECOVERY = "protected.json", "recovery.json"
PARITY_GLOB = "parity.[01]"
MEMORY_VARIABLE = "MESHWRIGHT_MEMORY"  # environment variable: a directory in a file system that lives in memory


@dataclass(frozen=True)
class ProtectedStep:
    """The newest protected step; -1: none. The field names are the keys of the JSON."""

    step: int = -1
    seal: str = ""  # of this host's snapshot of the step, see `HostSnapshot.seal`
    seconds: float = 0.0  # from the snapshot being complete on every host of the group to its parity being complete
    bytes: int = 0  # of parity, on this host


@dataclass(frozen=True)
class Recovery:
    """What a session can restore from memory. The field names are the keys of the JSON."""

    step: int  # -1: nothing
    rebuilt: tuple[int, ...] = ()  # hosts whose snapshots were rebuilt from parity
    note: str = ""  # what was lost and rebuilt, or why nothing can be restored
    damaged: tuple[str, ...] = ()  # one sentence for each damaged slot
    seconds: float = 0.0  # spent on verifying and rebuilding


def write_status(directory: Path, status: ProtectedStep | Recovery) -> None:
    """Replace the status file of this kind in `directory`."""
    name = PROTECTED if isinstance(status, ProtectedStep) else RECOVERY
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    draft = directory / f".{name}.{os.getpid()}"
    draft.write_text(json.dumps(asdict(status)))
    os.replace(draft, directory / name)


def read_protected(directory: Path) -> ProtectedStep:
    """Read what is protected; `ProtectedStep()` if the agent has written nothing."""
    content = _read(directory / PROTECTED)
    return ProtectedStep(**content) if content else ProtectedStep()


def read_recovery(directory: Path) -> Recovery | None:
    """Read what the agent wrote before this session; None if there is no agent."""
    content = _read(directory / RECOVERY)
    return recovery_from_json(content) if content else None


def recovery_from_json(content: dict) -> Recovery:
    """Build a Recovery from its JSON."""
    return Recovery(**{**content, "rebuilt": tuple(content["rebuilt"]), "damaged": tuple(content["damaged"])})


def remove_leftovers(directory: Path) -> None:
    """Delete the files of a snapshot agent if `directory` has no snapshots."""
    if not directory.is_dir() or any(directory.glob("[0-9]*.[01]")):
        return
    for pattern in (PARITY_GLOB, "*.json", ".*", "*.draft"):
        for path in directory.glob(pattern):
            path.unlink(missing_ok=True)
    for folder in (directory, directory.parent):
        with contextlib.suppress(OSError):  # not empty: it also belongs to another host
            folder.rmdir()


def memory_directory(run: Path, *, host: int) -> Path:
    """Return the directory for the slots of a host: under `MEMORY_VARIABLE`, by default in /dev/shm if it exists.

    Hosts that are simulated on one machine have different directories.
    """
    base = Path(os.environ.get(MEMORY_VARIABLE) or ("/dev/shm" if Path("/dev/shm").is_dir() else run / "memory"))
    return base / f"meshwright-{os.getuid()}" / xxhash.xxh3_64_hexdigest(str(run.absolute()).encode()) / f"host-{host}"


def _read(file: Path) -> dict | None:
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):
        return None
