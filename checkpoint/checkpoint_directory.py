"""The directory of a run's checkpoints: committed steps, interrupted saves, quarantined checkpoints.

    checkpoints/12/             a checkpoint; it is committed once it has a manifest
    checkpoints/.parts-12/      the part of the manifest of step 12 from each process, until the manifest is written
    checkpoints/quarantine/     damaged checkpoints, moved here and never deleted

Only process 0 of a run changes the directory, except that each process writes its own part.
"""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from . import manifest
from .manifest import DamagedCheckpoint, Manifest

QUARANTINE, PROCESSES = "quarantine", "processes"


class CheckpointDirectory:
    """The checkpoints under `directory`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def path(self, step: int) -> Path:
        """Return the path of the checkpoint of `step`."""
        return self.directory / str(step)

    @property
    def step_directories(self) -> list[int]:
        """Steps that have a directory, committed or not, oldest first."""
        if not self.directory.is_dir():
            return []
        return sorted(int(path.name) for path in self.directory.iterdir() if path.name.isdigit() and path.is_dir())

    @property
    def steps(self) -> list[int]:
        """Committed steps, oldest first; their content is verified only when it is read."""
        return [step for step in self.step_directories if (self.path(step) / manifest.NAME).exists()]

    @property
    def quarantined(self) -> list[str]:
        """Names of the quarantined checkpoints."""
        return sorted(path.name for path in (self.directory / QUARANTINE).glob("*") if path.is_dir())

    def parts_directory(self, step: int) -> Path:
        """Return the directory for the manifest parts of `step`."""
        return self.directory / f".parts-{step}"

    def begin(self, step: int, *, processes: int) -> None:
        """Note that a save of `step` by this many processes has started; it is unfinished until it is committed."""
        directory = self.parts_directory(step)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / PROCESSES).write_text(json.dumps(processes))  # a torn file also means unfinished

    def write_part(self, part: Manifest, *, process: int) -> None:
        """Write the part of the manifest that `process` knows."""
        directory = self.parts_directory(part.step)
        directory.mkdir(parents=True, exist_ok=True)
        manifest.write_durably(directory / f"{process}.json", manifest.manifest_text(part))

    def commit(self, step: int, *, timeout: float = 0.0) -> None:
        """Write the manifest of `step`, whose arrays are on disk.

        `timeout`: seconds to wait for the parts of other processes. Raises DamagedCheckpoint if one is missing.
        """
        directory, deadline = self.parts_directory(step), time.monotonic() + timeout
        while (parts := self._read_parts(directory)) is None:
            if time.monotonic() >= deadline:
                raise DamagedCheckpoint(f"checkpoint {step}: {directory} lacks the manifest part of a process")
            time.sleep(0.01)
        manifest.write(self.path(step), manifest.merge_parts(parts))
        shutil.rmtree(directory, ignore_errors=True)  # leftovers are removed by `remove_unfinished`

    def _read_parts(self, directory: Path) -> list[Manifest] | None:
        """Return the part of each process; None if one is not written yet."""
        try:
            count = json.loads((directory / PROCESSES).read_text())
            return [manifest.parse_manifest((directory / f"{process}.json").read_text()) for process in range(count)]
        except (OSError, ValueError, TypeError, KeyError):
            return None

    def quarantine(self, step: int) -> Path:
        """Move the checkpoint of `step` to the quarantine directory; return its new path."""
        directory = self.directory / QUARANTINE
        directory.mkdir(exist_ok=True)
        number = sum(1 for name in self.quarantined if name.split(".")[0] == str(step))
        target = directory / (f"{step}.{number}" if number else str(step))
        self.path(step).rename(target)
        return target

    def remove(self, step: int) -> None:
        """Delete the checkpoint of `step`; it is renamed first, so that nobody reads half of it."""
        removed = self.directory / f".removed-{step}"
        self.path(step).rename(removed)
        shutil.rmtree(removed)

    def recover_interrupted(self, on_quarantine: Callable[[int, str], None]) -> None:
        """Before a session: finish interrupted commits, quarantine damaged checkpoints, delete unfinished saves.

        `on_quarantine(step, reason)` is called for each checkpoint that is quarantined.
        """
        for step in sorted(set(self.step_directories) - set(self.steps)):
            unfinished = self.parts_directory(step).is_dir()
            try:
                self.commit(step)
            except DamagedCheckpoint as error:
                if unfinished:  # killed before every process had written its part: it never was a checkpoint
                    self.remove(step)
                else:
                    on_quarantine(step, str(error))
                    self.quarantine(step)
        self.remove_unfinished()

    def discard(self, step: int) -> None:
        """Delete what a failed save of `step` left behind, unless the step was committed before it failed."""
        if step not in self.steps:
            shutil.rmtree(self.path(step), ignore_errors=True)
        self.remove_unfinished()

    def remove_unfinished(self) -> None:
        """Delete what unfinished saves left behind: they never were checkpoints."""
        if not self.directory.is_dir():
            return
        for path in self.directory.iterdir():
            if path.name.startswith((".parts-", ".removed-")) or ".orbax-checkpoint-tmp" in path.name:
                shutil.rmtree(path, ignore_errors=True)
