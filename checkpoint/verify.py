"""Checkpoints read again and compared with their manifests, without the run's model: ls, verify, repair.

list_steps(shelf)     what there is, from names and manifests alone
examine(shelf)        every step read whole and compared
repair(shelf)         interrupted commits finished, damaged steps set aside, mended ones brought back
"""

from collections.abc import Iterator
from dataclasses import dataclass

import jax
from jax.sharding import Mesh

from . import manifest as manifests
from .checkpoint_directory import QUARANTINE, CheckpointDirectory
from .integrity import verify_arrays
from .manifest import NAME, DamagedCheckpoint
from .storage import load, shard_evenly


@dataclass(frozen=True)
class CheckpointEntry:
    """One checkpoint as its directory tells it."""

    step: int
    status: str  # committed, unfinished (its save or commit is under way or was cut short), damaged, quarantined
    bytes: int = 0
    arrays: int = 0  # logical arrays
    layout: str = ""
    why: str = ""  # not whole


def list_steps(shelf: CheckpointDirectory) -> list[CheckpointEntry]:
    """Every checkpoint, oldest first, then what was set aside. Reads manifests, not arrays."""
    aside = [
        CheckpointEntry(int(name.split(".")[0]), "quarantined", why=f"{QUARANTINE}/{name}")
        for name in shelf.quarantined
        if name.split(".")[0].isdigit()
    ]
    return [read_entry(shelf, step) for step in shelf.step_directories] + aside


def read_entry(shelf: CheckpointDirectory, step: int) -> CheckpointEntry:
    """One checkpoint, from its manifest."""
    size = sum(file.stat().st_size for file in shelf.path(step).rglob("*") if file.is_file())
    if not (shelf.path(step) / NAME).exists() and shelf.parts_directory(step).is_dir():
        return CheckpointEntry(step, "unfinished", size, why="its manifest is not written yet")
    try:
        manifest = manifests.read(shelf.path(step))
    except DamagedCheckpoint as error:
        return CheckpointEntry(step, "damaged", size, why=str(error))
    return CheckpointEntry(step, "committed", size, len(manifest.arrays), manifest.layout)


def verify_all(shelf: CheckpointDirectory) -> Iterator[CheckpointEntry]:
    """Every checkpoint read whole and compared with its manifest, oldest first; what was set aside is not read."""
    for entry in list_steps(shelf):
        if entry.status == "committed" and (why := find_damage(shelf, entry.step)):
            yield CheckpointEntry(entry.step, "damaged", entry.bytes, entry.arrays, entry.layout, why)
        elif entry.status != "quarantined":
            yield entry


def find_damage(shelf: CheckpointDirectory, step: int) -> str:
    """What is wrong with a checkpoint; "" where it is whole. Holds the whole state on one device."""
    mesh = Mesh(jax.local_devices()[:1], ("all",))
    try:
        manifest = manifests.read(shelf.path(step))
        arrays = load(shelf, manifest, shard_evenly(manifest, mesh))
        verify_arrays(arrays, manifest, where=shelf.path(step))
    except DamagedCheckpoint as error:
        return str(error)
    return ""


def repair(shelf: CheckpointDirectory) -> list[str]:
    """Make the directory one that a run goes on from; what was done, a sentence each. No run may be writing to it.

    Commits cut short are finished. Damaged steps are set aside, and steps that were set aside and are whole again
    (a copy was brought back) return to their place. Nothing is deleted but saves that never ended.
    """
    done: list[str] = []
    before = set(shelf.steps)
    shelf.recover_interrupted(lambda step, why: done.append(f"step {step} set aside: {why}"))
    done += [f"step {step}: its commit was cut short, and is finished" for step in sorted(set(shelf.steps) - before)]
    for entry in verify_all(shelf):
        if entry.status == "damaged":
            place = shelf.quarantine(entry.step)
            done.append(f"step {entry.step} set aside in {place.name}: {entry.why}")
    for name in shelf.quarantined:
        step = name.split(".")[0]
        if not step.isdigit() or shelf.path(int(step)).exists():
            continue
        (shelf.directory / QUARANTINE / name).rename(shelf.path(int(step)))
        if find_damage(shelf, int(step)):
            shelf.path(int(step)).rename(shelf.directory / QUARANTINE / name)
        else:
            done.append(f"step {step} is whole and back in its place")
    return done
