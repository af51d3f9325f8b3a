"""Listing, verification and repair of checkpoints, without the model of the run.

list_steps(checkpoints)     what there is, from file names and manifests alone
verify_all(checkpoints)     every checkpoint is read and compared with its manifest
repair(checkpoints)         interrupted commits are finished, damaged steps quarantined, intact ones brought back
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
    """The state of one checkpoint. `meshwright checkpoint ls --json` prints the fields by their names."""

    step: int
    status: str  # committed, unfinished (its save or commit goes on or was interrupted), damaged, quarantined
    bytes: int = 0
    arrays: int = 0  # logical arrays
    layout: str = ""
    why: str = ""  # it is not committed


def list_steps(checkpoints: CheckpointDirectory) -> list[CheckpointEntry]:
    """Return every checkpoint, oldest first, then the quarantined ones. Reads manifests, not arrays."""
    quarantined = [
        CheckpointEntry(int(name.split(".")[0]), "quarantined", why=f"{QUARANTINE}/{name}")
        for name in checkpoints.quarantined
        if name.split(".")[0].isdigit()
    ]
    return [read_entry(checkpoints, step) for step in checkpoints.step_directories] + quarantined


def read_entry(checkpoints: CheckpointDirectory, step: int) -> CheckpointEntry:
    """Return the state of one checkpoint, from its manifest."""
    size = sum(file.stat().st_size for file in checkpoints.path(step).rglob("*") if file.is_file())
    if not (checkpoints.path(step) / NAME).exists() and checkpoints.parts_directory(step).is_dir():
        return CheckpointEntry(step, "unfinished", size, why="its manifest is not written yet")
    try:
        manifest = manifests.read(checkpoints.path(step))
    except DamagedCheckpoint as error:
        return CheckpointEntry(step, "damaged", size, why=str(error))
    return CheckpointEntry(step, "committed", size, len(manifest.arrays), manifest.layout)


def verify_all(checkpoints: CheckpointDirectory) -> Iterator[CheckpointEntry]:
    """Read every checkpoint and compare it with its manifest, oldest first. Quarantined ones are not read."""
    for entry in list_steps(checkpoints):
        if entry.status == "committed" and (why := find_damage(checkpoints, entry.step)):
            yield CheckpointEntry(entry.step, "damaged", entry.bytes, entry.arrays, entry.layout, why)
        elif entry.status != "quarantined":
            yield entry


def find_damage(checkpoints: CheckpointDirectory, step: int) -> str:
    """Say what is wrong with a checkpoint; "" if it is intact. Needs the memory for all arrays on one device."""
    mesh = Mesh(jax.local_devices()[:1], ("all",))
    try:
        manifest = manifests.read(checkpoints.path(step))
        arrays = load(checkpoints, manifest, shard_evenly(manifest, mesh))
        verify_arrays(arrays, manifest, where=checkpoints.path(step))
    except DamagedCheckpoint as error:
        return str(error)
    return ""


def repair(checkpoints: CheckpointDirectory) -> list[str]:
    """Repair the directory so that a run can go on from it; return a sentence for each action.

    Interrupted commits are finished. Damaged steps are quarantined, and quarantined steps that are intact (somebody
    copied files back) return. Only unfinished saves are deleted. No run may be writing to the directory.
    """
    actions: list[str] = []
    before = set(checkpoints.steps)
    checkpoints.recover_interrupted(lambda step, why: actions.append(f"step {step} quarantined: {why}"))
    actions += [f"step {step}: its interrupted commit was finished" for step in sorted(set(checkpoints.steps) - before)]
    for entry in verify_all(checkpoints):
        if entry.status == "damaged":
            path = checkpoints.quarantine(entry.step)
            actions.append(f"step {entry.step} quarantined as {path.name}: {entry.why}")
    for name in checkpoints.quarantined:
        step = name.split(".")[0]
        if not step.isdigit() or checkpoints.path(int(step)).exists():
            continue
        (checkpoints.directory / QUARANTINE / name).rename(checkpoints.path(int(step)))
        if find_damage(checkpoints, int(step)):
            checkpoints.path(int(step)).rename(checkpoints.directory / QUARANTINE / name)
        else:
            actions.append(f"step {step} is intact and was brought back")
    return actions
