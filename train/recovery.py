"""The state to go on from: the newest checkpoint that is whole on every process, or a fresh state where there is none.

A damaged checkpoint is set aside (never deleted), journalled with the reason, and the one before it is tried. A run
whose checkpoints are all damaged is refused: it never starts from scratch over them.
"""

import time

import jax
import numpy as np
import psutil
from jax.experimental import multihost_utils

from ..checkpoint.manifest import DamagedCheckpoint
from ..checkpoint.shelf import QUARANTINE, Shelf
from ..checkpoint.storage import Storage
from ..configs.errors import MeshwrightError
from ..parallel.state import TrainState
from .program import Program
from .report.journal import Journal


def recovered(program: Program, storage: Storage, journal: Journal, *, corpus: str) -> tuple[TrainState, int]:
    """The state to go on from, and its step. `corpus` is the data's fingerprint.

    Raises MeshwrightError where the data are others than the checkpoint's, or every checkpoint is damaged.
    """
    shelf = storage.shelf
    reason = "newest whole checkpoint"
    startup = {"startup_seconds": time.time() - psutil.Process().create_time()}
    began = time.monotonic()
    if jax.process_index() == 0:
        shelf.tidy(lambda step, why: journal.record("quarantine", step=step, reason=why))
    while (step := agreed(newest(shelf))) >= 0:
        try:
            damage = ""
            state, saved = storage.restore(step, shapes=program.shapes, shardings=program.shardings)
        except DamagedCheckpoint as error:
            damage = str(error)
        if not (holders := damaged_on(damage)):
            check_corpus(step, saved, corpus)
            spent = {**startup, "restore_seconds": time.monotonic() - began}
            journal.record("restore", step=step, level="storage", reason=reason, **spent)
            return state, step
        if jax.process_index() == 0:
            why = damage or f"process {holders[0]} found it damaged"
            place = shelf.quarantine(step)
            journal.record("quarantine", step=step, reason=why, place=str(place.relative_to(shelf.directory)))
        reason = f"checkpoint {step} is damaged"
    if agreed(len(shelf.quarantined)):
        raise MeshwrightError(
            f"every checkpoint in {shelf.directory} is damaged and was set aside in {QUARANTINE}/ (why: events.jsonl); "
            f"bring a good copy back, delete {QUARANTINE}/ to start from step 0, or train under another name"
        )
    journal.record("start", step=0, **startup)
    return program.initialized(), 0


def check_corpus(step: int, saved: dict, corpus: str) -> None:
    """Raise MeshwrightError where the checkpoint was trained on other data."""
    if saved.get("corpus") != corpus:
        raise MeshwrightError(
            f"checkpoint {step} was trained on corpus {saved.get('corpus')}, and the data are {corpus} now; "
            "bring back the documents, or train under another name"
        )


def newest(shelf: Shelf) -> int:
    """The newest committed step; -1 where there is none."""
    return max(shelf.steps, default=-1)


def agreed(value: int) -> int:
    """The first process's value, on every process."""
    return int(multihost_utils.broadcast_one_to_all(np.int32(value))) if jax.process_count() > 1 else value


def damaged_on(damage: str) -> list[int]:
    """The processes that found damage, the same list on all of them."""
    found = np.array(bool(damage))
    if jax.process_count() > 1:
        found = multihost_utils.process_allgather(found)
    return [int(process) for process in np.flatnonzero(found)]
