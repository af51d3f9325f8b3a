"""A save that is killed, or refused by the disk, at each single operation on files of ours: what is left is whole."""

import errno
import os
import shutil
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp
from support.plain_storage import PLAIN, restore, small_state

from meshwright.checkpoint.storage import Storage
from meshwright.configs.sections.training import CheckpointConfig
from meshwright.train.checkpointer import Checkpointer
from meshwright.train.core.event_log import EventLog, read_events

OPERATIONS = [
    (os, "replace"), (os, "fsync"), (shutil, "rmtree"), (Path, "rename"), (Path, "mkdir"), (Path, "write_text"),
    (Path, "open"), (ocp, "save_async"), (ocp, "load"),
]  # fmt: skip
MOST_OPERATIONS = 60  # operations of a save, at most


class Killed(BaseException):
    """Stands for SIGKILL: nothing that handles errors handles it."""


def kill():
    raise Killed


def fail(code):
    raise OSError(code, os.strerror(code))


HOW = {
    "killed before": (True, kill),
    "killed after": (False, kill),
    "no space": (True, lambda: fail(errno.ENOSPC)),
    "input/output error": (True, lambda: fail(errno.EIO)),
}


class Crash:
    """Fails at operation `number` of those that this package asks for."""

    def __init__(self, monkeypatch, number, how):
        self.left, (self.before, self.fail) = number, HOW[how]
        self.writing = []  # arrays, by threads of Orbax, which no exception ends
        for owner, name in OPERATIONS:
            monkeypatch.setattr(owner, name, self.wrap(getattr(owner, name)))

    def wrap(self, real):
        def operation(*args, **kwargs):
            if not sys._getframe(1).f_globals.get("__name__", "").startswith("meshwright."):
                return real(*args, **kwargs)
            self.left -= 1
            fails = self.left == 0
            if fails and self.before:
                self.fail()
            result = real(*args, **kwargs)
            if hasattr(result, "result"):
                self.writing.append(result)
            if fails and hasattr(result, "close"):
                result.close()
            if fails:
                self.fail()
            return result

        return operation


def make_checkpointer(root):
    """The checkpointer of the next session, after what the session before left is repaired."""
    storage = Storage(root / "checkpoints", layout=PLAIN)
    damaged = []
    storage.checkpoints.recover_interrupted(lambda step, reason: damaged.append((step, reason)))
    assert not damaged, "what was interrupted was taken for damage"
    return Checkpointer(CheckpointConfig(every=1, keep=1), storage, EventLog(root), {})


def check(storage, step):
    """The newest checkpoint is of `step`, and whole."""
    assert storage.steps[-1] == step
    state, data = restore(storage, step, small_state(0))
    assert data == {"samples": step} and np.all(np.asarray(state.params["a"]) == step)


@pytest.mark.parametrize("how", HOW)
def test_a_save_that_fails_at_any_operation_leaves_the_newest_that_was_committed(tmp_path, monkeypatch, how):
    for number in range(1, MOST_OPERATIONS):
        root = tmp_path / str(number)
        root.mkdir()
        checkpointer = make_checkpointer(root)
        checkpointer.start_save(small_state(1), 1, samples=1)
        checkpointer.wait()
        with monkeypatch.context() as patched:
            crash = Crash(patched, number, how)
            try:
                checkpointer.start_save(small_state(2), 2, samples=2)
                checkpointer.wait()
            except Killed:
                with suppress(Killed):
                    checkpointer.storage.close()
                checkpointer = None
            for arrays in crash.writing:
                arrays.result()
        if checkpointer is None:
            checkpointer = make_checkpointer(root)
            committed = [event["step"] for event in read_events(root) if event["event"] == "commit"]
            check(checkpointer.storage, 2 if 2 in checkpointer.storage.steps else max(committed))
        elif checkpointer.failure is not None:
            check(checkpointer.storage, checkpointer.storage.steps[-1])  # 2 where what failed came after its manifest
        assert {path.name for path in (root / "checkpoints").iterdir()} <= {"1", "2", ".removed-1"}
        checkpointer.save_final(small_state(3), 3, samples=3)
        checkpointer.finish()
        check(checkpointer.storage, 3)
        checkpointer.storage.close()
        if crash.left > 0:
            break
    assert 10 < number < MOST_OPERATIONS - 1
