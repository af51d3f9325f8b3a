"""The directory of a run's checkpoints: which steps are committed, what is left over, what was set aside.

    checkpoints/12/             a checkpoint; committed where it has a manifest
    checkpoints/.parts-12/      what each process saw of step 12, until the manifest is written
    checkpoints/quarantine/     damaged checkpoints, moved here and never deleted

One process of a run changes the directory; the others read.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from . import manifest
from .manifest import DamagedCheckpoint, Manifest

QUARANTINE = "quarantine"


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

    def put_part(self, part: Manifest, *, process: int, processes: int) -> None:
        """What `process` of `processes` saw, on disk before the arrays are committed."""
        place = self.parts(part.step)
        place.mkdir(parents=True, exist_ok=True)
        manifest.write_whole(place / f"{process}.json", manifest.text_of(part))
        if process == 0:
            manifest.write_whole(place / "processes", json.dumps(processes))

    def commit(self, step: int) -> None:
        """Write the manifest of `step`, whose arrays are on disk. Raises DamagedCheckpoint where parts are missing."""
        place = self.parts(step)
        try:
            count = json.loads((place / "processes").read_text())
            parts = [manifest.parsed((place / f"{number}.json").read_text()) for number in range(count)]
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise DamagedCheckpoint(f"checkpoint {step}: {place} is not whole: {error}") from error
        manifest.write(self.path(step), manifest.merged(parts))
        shutil.rmtree(place)

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
            try:
                self.commit(step)
            except DamagedCheckpoint as error:
                told(step, str(error))
                self.quarantine(step)
        self.clear_unfinished()

    def clear_unfinished(self) -> None:
        """Delete what a save that did not end well left behind: it was never a checkpoint."""
        if not self.directory.is_dir():
            return
        for path in self.directory.iterdir():
            if path.name.startswith((".parts-", ".removed-")) or ".orbax-checkpoint-tmp" in path.name:
                shutil.rmtree(path, ignore_errors=True)
