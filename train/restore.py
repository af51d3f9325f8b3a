"""The state to go on from: the newest checkpoint that is whole on every process, or a fresh state where there is none.

A damaged checkpoint is set aside (never deleted), journalled with the reason, and the one before it is tried. A run
whose checkpoints are all damaged is refused: it never starts from scratch over them.
"""

import time

import jax
import numpy as np
import psutil
from jax.experimental import multihost_utils

from ..checkpoint.checkpoint_directory import QUARANTINE, Shelf
from ..checkpoint.manifest import DamagedCheckpoint
from ..checkpoint.memory_store import Memory
from ..checkpoint.redundancy.agent_files import Recovery
from ..checkpoint.storage import Storage, by_path, tree
from ..configs.errors import MeshwrightError
from ..parallel.multihost import firsts
from ..parallel.state import TrainState
from .core.event_log import Journal, read_events
from .engine.program import Program
from .engine.quantized_base import completed

OFFERED = 8  # steps a process names as restorable: two slots hold two


def recovered(
    program: Program, storage: Storage, memory: Memory | None, journal: Journal, *, corpus: str
) -> tuple[TrainState, int]:
    """The state to go on from, and its step, from whichever level has the newest. `corpus` is the data's fingerprint.

    Raises MeshwrightError where the data are others than the checkpoint's, or every checkpoint is damaged.
    """
    shelf, levels = storage.shelf, {"storage": storage, "memory": memory}
    startup = {"startup_seconds": time.time() - psutil.Process().create_time()}
    began = time.monotonic()
    if jax.process_index() == 0:
        shelf.tidy(lambda step, why: journal.record("quarantine", step=step, reason=why))
        if memory is not None and not read_events(journal.path.parent):
            memory.clear()  # of another run that had this name
    word = memory.recovery if memory is not None else None
    for damage in word.damaged if word is not None else ():
        journal.record("quarantine", level="memory", reason=damage)
    reason, refused = "the newest there is", set[int]()
    while True:
        step, level = newest(shelf, memory, program, without=refused)
        if step < 0:
            break
        try:
            damage = ""
            state, saved = levels[level].restore(step, shapes=program.shapes, shardings=program.shardings)
        except DamagedCheckpoint as error:
            damage = str(error)
        if not (holders := damaged_on(damage)):
            check_corpus(step, saved, corpus)
            program.check_origin(saved.get("origin"))
            spent = {**startup, "restore_seconds": time.monotonic() - began}
            if level == "storage" and memory is not None:
                if lack := memory.wanting(step, by_path(tree(program.shardings)), by_path(tree(program.shapes))):
                    reason = f"{reason}; memory: {lack}"
                memory.forget(beyond=step - 1)  # what it has of this step is another time line's
            elif memory is not None:
                memory.forget(beyond=step)
            if word is not None:
                level, reason = told(word, step, level, reason)
                spent["rebuild_seconds"] = word.seconds
            journal.record("restore", step=step, level=level, reason=reason, **spent)
            return completed(program, state, shelf.directory.parent, origin=saved.get("origin")), step
        set_aside(step, level, shelf, journal, why=damage or f"process {holders[0]} found it damaged")
        if level == "memory":
            refused.add(step)
        reason = f"{step} in {level} is damaged"
    if firsts(len(shelf.quarantined)):
        raise MeshwrightError(
            f"every checkpoint in {shelf.directory} is damaged and was set aside in {QUARANTINE}/ (why: events.jsonl); "
            f"bring a good copy back, delete {QUARANTINE}/ to start from step 0, or train under another name"
        )
    journal.record("start", step=0, **startup)
    return program.initialized(), 0


def told(word: Recovery, step: int, level: str, reason: str) -> tuple[str, str]:
    """(level, reason) of a restore, with what the keepers had to say."""
    if level == "memory" and step == word.step and word.rebuilt:
        return "parity", word.note
    if level == "storage" and word.note:
        return level, f"{reason}; memory: {word.note}"
    return level, reason


def set_aside(step: int, level: str, shelf: Shelf, journal: Journal, *, why: str) -> None:
    """Move a damaged checkpoint out of the way; a damaged snapshot is left to be overwritten. Journalled."""
    if jax.process_index() != 0:
        return
    place = shelf.quarantine(step).relative_to(shelf.directory) if level == "storage" else None
    journal.record("quarantine", step=step, level=level, reason=why, place=str(place))


def newest(shelf: Shelf, memory: Memory | None, program: Program, *, without: set[int]) -> tuple[int, str]:
    """(step, level) of the newest that every process can have, the same on all; memory where both have it; -1: none."""
    stored = firsts(max(shelf.steps, default=-1))
    if memory is None:
        return stored, "storage"
    own = memory.steps(by_path(tree(program.shardings)), by_path(tree(program.shapes)))
    held = max(common(set(own) - without), default=-1)
    return (held, "memory") if held >= stored else (stored, "storage")


def common(steps: set[int]) -> set[int]:
    """The steps that every process has, of its newest `OFFERED`."""
    if jax.process_count() == 1:
        return steps
    offered = np.full(OFFERED, -1, np.int32)
    chosen = sorted(steps)[-OFFERED:]
    offered[: len(chosen)] = chosen
    everybodys = multihost_utils.process_allgather(offered)
    return set.intersection(*(set(map(int, row)) - {-1} for row in everybodys))


def check_corpus(step: int, saved: dict, corpus: str) -> None:
    """Raise MeshwrightError where the checkpoint was trained on other data."""
    if saved.get("corpus") != corpus:
        raise MeshwrightError(
            f"checkpoint {step} was trained on corpus {saved.get('corpus')}, and the data are {corpus} now; "
            "bring back the documents, or train under another name"
        )


def damaged_on(damage: str) -> list[int]:
    """The processes that found damage, the same list on all of them."""
    found = np.array(bool(damage))
    if jax.process_count() > 1:
        found = multihost_utils.process_allgather(found)
    return [int(process) for process in np.flatnonzero(found)]
