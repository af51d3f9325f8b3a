"""Restore: a session starts from the newest state that is complete on every process, or from the seed if there is none.

There are two levels: snapshots in the host's memory and checkpoints in storage. A damaged checkpoint is quarantined
(moved away, never deleted), recorded with the reason, and the one before it is tried. If all checkpoints of a run are
damaged, the run is refused: it never starts from step 0 over them.
"""

import time

import jax
import numpy as np
import psutil
from jax.experimental import multihost_utils

from ..checkpoint.checkpoint_directory import QUARANTINE, CheckpointDirectory
from ..checkpoint.manifest import DamagedCheckpoint
from ..checkpoint.memory_store import MemoryStore
from ..checkpoint.redundancy.agent_files import Recovery
from ..checkpoint.storage import Storage, flatten_paths, saved_tree
from ..configs.errors import MeshwrightError
from ..parallel.multihost import all_gather_int, broadcast_int
from ..parallel.state import TrainState
from .core.event_log import EventLog, read_events
from .engine.program import Program
from .engine.quantized_base import restore_frozen

MAX_OFFERED_STEPS = 8  # restorable snapshots that a process reports at most; the two slots hold two


def restore_latest(
    program: Program, storage: Storage, memory: MemoryStore | None, event_log: EventLog, *, corpus: str
) -> tuple[TrainState, int]:
    """Return the newest state that every process can restore, and its step, after recording the restore. Collective.

    `corpus` is the fingerprint of the data. Raises MeshwrightError if the checkpoint was trained on other data, or if
    every checkpoint is damaged.
    """
    checkpoints, levels = storage.checkpoints, {"storage": storage, "memory": memory}
    arrays = tuple(flatten_paths(saved_tree(tree)) for tree in (program.shardings, program.shapes))
    startup = {"startup_seconds": time.time() - psutil.Process().create_time()}
    began = time.monotonic()
    if jax.process_index() == 0:
        checkpoints.recover_interrupted(lambda step, why: event_log.record("quarantine", step=step, reason=why))
        if memory is not None and not read_events(event_log.path.parent):
            memory.clear()  # it holds snapshots of an earlier run of this name
    recovery = memory.recovery if memory is not None else None
    for damage in recovery.damaged if recovery is not None else ():
        event_log.record("quarantine", level="memory", reason=damage)
    reason, damaged_snapshots = "the newest there is", set[int]()
    while True:
        step, level = newest_restorable(checkpoints, memory, arrays, excluded=damaged_snapshots)
        if step < 0:
            break
        try:
            damage = ""
            state, metadata = levels[level].restore(step, shapes=program.shapes, shardings=program.shardings)
        except DamagedCheckpoint as error:
            damage = str(error)
        damaged_processes = [process for process, bad in enumerate(all_gather_int(int(bool(damage)))) if bad]
        if not damaged_processes:
            check_corpus(step, metadata, corpus)
            program.check_origin(metadata.get("origin"))
            seconds = {**startup, "restore_seconds": time.monotonic() - began}
            if level == "storage" and memory is not None:
                if why_unusable := memory.why_unusable(step, *arrays):
                    reason = f"{reason}; memory: {why_unusable}"
                memory.delete_after(beyond=step - 1)  # a snapshot of this very step belongs to another history
            elif memory is not None:
                memory.delete_after(beyond=step)
            if recovery is not None:
                level, reason = reported_level(recovery, step, level, reason)
                seconds["rebuild_seconds"] = recovery.seconds
            event_log.record("restore", step=step, level=level, reason=reason, **seconds)
            return restore_frozen(program, state, checkpoints.directory.parent, origin=metadata.get("origin")), step
        reason = damage or f"process {damaged_processes[0]} found it damaged"
        quarantine_damaged(step, level, checkpoints, event_log, reason=reason)
        if level == "memory":
            damaged_snapshots.add(step)
        reason = f"{step} in {level} is damaged"
    if broadcast_int(len(checkpoints.quarantined)):
        raise MeshwrightError(
            f"every checkpoint in {checkpoints.directory} is damaged and was moved to {QUARANTINE}/ (events.jsonl says "
            f"why); bring a good copy back, delete {QUARANTINE}/ to start from step 0, or train under another name"
        )
    event_log.record("start", step=0, **startup)
    return program.initialize(), 0


def reported_level(recovery: Recovery, step: int, level: str, reason: str) -> tuple[str, str]:
    """Return (level, reason) for the event, with what the snapshot agents reported of their recovery."""
    if level == "memory" and step == recovery.step and recovery.rebuilt:
        return "parity", recovery.note
    if level == "storage" and recovery.note:
        return level, f"{reason}; memory: {recovery.note}"
    return level, reason


def quarantine_damaged(
    step: int, level: str, checkpoints: CheckpointDirectory, event_log: EventLog, *, reason: str
) -> None:
    """Move a damaged checkpoint away, and record it. A damaged snapshot stays until it is overwritten."""
    if jax.process_index() != 0:
        return
    place = checkpoints.quarantine(step).relative_to(checkpoints.directory) if level == "storage" else None
    event_log.record("quarantine", step=step, level=level, reason=reason, place=str(place))


def newest_restorable(
    checkpoints: CheckpointDirectory, memory: MemoryStore | None, arrays: tuple[dict, dict], *, excluded: set[int]
) -> tuple[int, str]:
    """Return (step, level) of the newest state that every process can restore; step -1: none. Collective.

    Memory is preferred if both levels have the step. `arrays` are the shardings and shapes of the state by path;
    `excluded` snapshots are damaged.
    """
    stored = broadcast_int(max(checkpoints.steps, default=-1))
    if memory is None:
        return stored, "storage"
    in_memory = max(common_steps(set(memory.usable_steps(*arrays)) - excluded), default=-1)
    return (in_memory, "memory") if in_memory >= stored else (stored, "storage")


def common_steps(steps: set[int]) -> set[int]:
    """Return the steps that every process has, out of the newest MAX_OFFERED_STEPS of each. Collective."""
    if jax.process_count() == 1:
        return steps
    offered = np.full(MAX_OFFERED_STEPS, -1, np.int32)
    newest = sorted(steps)[-MAX_OFFERED_STEPS:]
    offered[: len(newest)] = newest
    return set.intersection(*(set(map(int, row)) - {-1} for row in multihost_utils.process_allgather(offered)))


def check_corpus(step: int, metadata: dict, corpus: str) -> None:
    """Raise MeshwrightError if the checkpoint was trained on other data."""
    if metadata.get("corpus") != corpus:
        raise MeshwrightError(
            f"checkpoint {step} was trained on corpus {metadata.get('corpus')}, and the data are {corpus} now; "
            "bring back the documents, or train under another name"
        )
