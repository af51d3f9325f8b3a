"""A save that is killed, or refused by the disk, at each single operation on files of ours: what is left is whole."""

import errno
import os
import shutil
import sys
from contextlib import suppress
from pathlib import Path

import jax
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from meshwright.checkpoint.layout_conversion import Layout
from meshwright.checkpoint.storage import Storage
from meshwright.configs.sections.training import CheckpointConfig
from meshwright.parallel.state import TrainState
from meshwright.train.checkpointer import Checkpointer
from meshwright.train.core.event_log import Journal, read_events

PLAIN = Layout("plain", lambda path, shape: [(path, ())])
OPERATIONS = [
    (os, "replace"), (os, "fsync"), (shutil, "rmtree"), (Path, "rename"), (Path, "mkdir"), (Path, "write_text"),
    (Path, "open"), (ocp, "save_async"), (ocp, "load"),
]  # fmt: skip
FINEST = 60  # operations of a save, at most


class Killed(BaseException):
    """Nothing that handles errors handles this."""


def killed():
    raise Killed


def refused(number):
    raise OSError(number, os.strerror(number))


HOW = {
    "killed before": (True, killed),
    "killed after": (False, killed),
    "no space": (True, lambda: refused(errno.ENOSPC)),
    "input/output error": (True, lambda: refused(errno.EIO)),
}


class Crash:
    """Fails at operation `number` of those that this package asks for."""

    def __init__(self, monkeypatch, number, how):
        self.left, (self.first, self.fail) = number, HOW[how]
        self.writing = []  # arrays, by threads of Orbax, which no exception ends
        for owner, name in OPERATIONS:
            monkeypatch.setattr(owner, name, self.wrapped(getattr(owner, name)))

    def wrapped(self, real):
        def operation(*args, **kwargs):
            if not sys._getframe(1).f_globals.get("__name__", "").startswith("meshwright."):
                return real(*args, **kwargs)
            self.left -= 1
            mine = self.left == 0
            if mine and self.first:
                self.fail()
            result = real(*args, **kwargs)
            if hasattr(result, "result"):
                self.writing.append(result)
            if mine and hasattr(result, "close"):
                result.close()
            if mine:
                self.fail()
            return result

        return operation


def state(step):
    whole = TrainState(np.int32(step), {"a": np.full(64, step, np.float32)}, {}, (), (), np.zeros(2, np.uint32))
    return jax.device_put(whole, jax.devices()[0])


def saving(root):
    """Of the next sitting: what the one before left is tidied up."""
    storage = Storage(root / "checkpoints", layout=PLAIN)
    told = []
    storage.checkpoints.recover_interrupted(lambda step, why: told.append((step, why)))
    assert not told, "what was cut short was taken for damage"
    return Checkpointer(CheckpointConfig(every=1, keep=1), storage, Journal(root), {})


def check(storage, step):
    """The newest is of `step`, and whole."""
    assert storage.steps[-1] == step
    shapes = jax.eval_shape(lambda: state(0))
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("x",))
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    found, data = storage.restore(step, shapes=shapes, shardings=jax.tree.map(lambda _: place, shapes))
    assert data == {"samples": step} and np.all(np.asarray(found.params["a"]) == step)


@pytest.mark.parametrize("how", HOW)
def test_a_save_that_fails_at_any_operation_leaves_the_newest_that_was_committed(tmp_path, monkeypatch, how):
    for number in range(1, FINEST):
        root = tmp_path / str(number)
        root.mkdir()
        saves = saving(root)
        saves.start_save(state(1), 1, samples=1)
        saves.wait()
        with monkeypatch.context() as patched:
            crash = Crash(patched, number, how)
            try:
                saves.start_save(state(2), 2, samples=2)
                saves.wait()
            except Killed:
                with suppress(Killed):
                    saves.storage.close()
                saves = None
            for arrays in crash.writing:
                arrays.result()
        if saves is None:
            saves = saving(root)
            committed = [event["step"] for event in read_events(root) if event["event"] == "commit"]
            check(saves.storage, 2 if 2 in saves.storage.steps else max(committed))
        elif saves.failure is not None:
            check(saves.storage, saves.storage.steps[-1])  # 2 where what failed came after its manifest
        assert {path.name for path in (root / "checkpoints").iterdir()} <= {"1", "2", ".removed-1"}
        saves.save_final(state(3), 3, samples=3)
        saves.finish()
        check(saves.storage, 3)
        saves.storage.close()
        if crash.left > 0:
            break
    assert 10 < number < FINEST - 1
