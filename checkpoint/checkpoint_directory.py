"""The directory of a run's checkpoints: which steps are committed, what is left over, what was set aside.

    checkpoints/12/             a checkpoint; committed where it has a manifest
    checkpoints/.parts-12/      what each process saw of step 12, until the manifest is written
    checkpoints/quarantine/     damaged checkpoints, moved here and never deleted

One process of a run changes the directory; the others read.
"""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from . import manifest
from .manifest import DamagedCheckpoint, Manifest

QUARANTINE, PROCESSES = "quarantine", "processes"


class Shelf:
    """The checkpoints under `directory`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def path(self, step: int) -> Path:
        """Where the checkpoint of `step` is or will be."""
        return self.directory / str(step)

    @property
    def present(self) -> list[int]:
        """Steps with a directory, whole or not, oldest first."""
        if not self.directory.is_dir():
            return []
        return sorted(int(path.name) for path in self.directory.iterdir() if path.name.isdigit() and path.is_dir())

    @property
    def steps(self) -> list[int]:
        """Committed steps, oldest first; what they hold is verified when it is read."""
        return [step for step in self.present if (self.path(step) / manifest.NAME).exists()]

    @property
    def quarantined(self) -> list[str]:
        """Names of what was set aside."""
        place = self.directory / QUARANTINE
        return sorted(path.name for path in place.iterdir() if path.is_dir()) if place.is_dir() else []

    def parts(self, step: int) -> Path:
        """Where the processes put what they saw of `step`."""
        return self.directory / f".parts-{step}"

    def begin(self, step: int, *, processes: int) -> None:
        """A save of `step` by so many processes begins: until it is committed it is known to be unfinished."""
        place = self.parts(step)
        place.mkdir(parents=True, exist_ok=True)
        (place / PROCESSES).write_text(json.dumps(processes))  # torn, it only means unfinished

    def put_part(self, part: Manifest, *, process: int) -> None:
        """What `process` saw of the state."""
        place = self.parts(part.step)
        place.mkdir(parents=True, exist_ok=True)
        manifest.write_whole(place / f"{process}.json", manifest.text_of(part))

    def commit(self, step: int, *, patience: float = 0.0) -> None:
        """Write the manifest of `step`, whose arrays are on disk.

        `patience`: seconds to wait for the parts of other processes. Raises DamagedCheckpoint where one is missing.
        """
        place, deadline = self.parts(step), time.monotonic() + patience
        while (parts := self._found(place)) is None:
            if time.monotonic() >= deadline:
                raise DamagedCheckpoint(f"checkpoint {step}: {place} is not whole")
            time.sleep(0.01)
        manifest.write(self.path(step), manifest.merged(parts))
        shutil.rmtree(place, ignore_errors=True)  # it is committed; what stays is tidied up

    def _found(self, place: Path) -> list[Manifest] | None:
        """What each process saw; None where one has not said it yet."""
        try:
            count = json.loads((place / PROCESSES).read_text())
            return [manifest.parsed((place / f"{number}.json").read_text()) for number in range(count)]
        except (OSError, ValueError, TypeError, KeyError):
            return None

    def quarantine(self, step: int) -> Path:
        """Move `step` aside; the place it is now in."""
        place = self.directory / QUARANTINE
        place.mkdir(exist_ok=True)
        number = sum(1 for name in self.quarantined if name.split(".")[0] == str(step))
        target = place / (f"{step}.{number}" if number else str(step))
        self.path(step).rename(target)
        return target

    def remove(self, step: int) -> None:
        """Delete `step`: out of sight first, so that nobody reads half of it."""
        draft = self.directory / f".removed-{step}"
        self.path(step).rename(draft)
        shutil.rmtree(draft)

    def tidy(self, told: Callable[[int, str], None]) -> None:
        """Before a sitting: finish interrupted commits, set aside what cannot be one, delete unfinished saves.

        `told(step, reason)` hears what is set aside.
        """
        for step in sorted(set(self.present) - set(self.steps)):
            unfinished = self.parts(step).is_dir()
            try:
                self.commit(step)
            except DamagedCheckpoint as error:
                if unfinished:  # killed before every process had said what it saw: it was never a checkpoint
                    self.remove(step)
                else:
                    told(step, str(error))
                    self.quarantine(step)
        self.clear_unfinished()

    def abandon(self, step: int) -> None:
        """Delete what a save of `step` left behind that did not end well, unless it was committed before it failed."""
        if step not in self.steps:
            shutil.rmtree(self.path(step), ignore_errors=True)
        self.clear_unfinished()

    def clear_unfinished(self) -> None:
        """Delete what saves that were begun and not finished left behind: they were never checkpoints."""
        if not self.directory.is_dir():
            return
        for path in self.directory.iterdir():
            if path.name.startswith((".parts-", ".removed-")) or ".orbax-checkpoint-tmp" in path.name:
                shutil.rmtree(path, ignore_errors=True)
