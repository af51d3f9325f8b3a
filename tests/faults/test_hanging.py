"""Storage that hangs: a write or an fsync that does not return, for a while or for ever."""

import os
import shutil
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
from orbax.checkpoint import v1 as ocp
from support.plain_storage import PLAIN, small_state
from support.small_run import SMALL
from support.waiting import wait_until

from meshwright.checkpoint import manifest
from meshwright.checkpoint import storage as storage_module
from meshwright.checkpoint.memory_store import MemoryStore
from meshwright.checkpoint.storage import Storage
from meshwright.checkpoint.storage_timeout import StorageTimeout, has_stuck_writer
from meshwright.configs.sections.training import CheckpointConfig
from meshwright.train import checkpointer as checkpointer_module
from meshwright.train.checkpointer import Checkpointer
from meshwright.train.core.event_log import EventLog, read_events
from meshwright.train.snapshot_writer import SnapshotWriter


def events(root):
    events = [event for event in read_events(root) if event["event"] != "save" and event.get("level") != "memory"]
    return [(event["event"], event["step"]) for event in events]


@pytest.fixture(params=["arrays", "fsync"])
def stuck(request, monkeypatch):
    """Nothing reaches the disk before `stuck.set()`: neither arrays, or no fsync returns."""
    gate = threading.Event()
    if request.param == "fsync":
        real = os.fsync
        monkeypatch.setattr(manifest.os, "fsync", lambda file: (wait_off_main_thread(gate), real(file)))
    else:
        real = ocp.save_async
        monkeypatch.setattr(ocp, "save_async", lambda *args: (gate.wait(60), real(*args))[1])
    yield gate
    gate.set()


def wait_off_main_thread(gate):
    """The fsync of the event log, on the training thread, is another file's."""
    if threading.current_thread() is not threading.main_thread():
        gate.wait(60)


@pytest.fixture
def clock(monkeypatch):
    """The clock of the storage, which stands still unless a test moves it."""
    clock = SimpleNamespace(now=0.0, monotonic=lambda: clock.now)
    monkeypatch.setattr(storage_module, "time", clock)
    return clock


@pytest.fixture
def saves(tmp_path, request, clock, stuck, monkeypatch):
    """(checkpointer with the policy that the test names, its snapshots, what it reported while it waited)."""
    monkeypatch.setattr(checkpointer_module, "REPORT_SECONDS", 0.01)
    reports = []

    def report_waiting(text):
        reports.append(text)
        clock.now += 0.0 if stuck.is_set() else 1.0

    config = CheckpointConfig(every=1, keep=99, memory_every=1, when_busy=request.param, timeout=2)
    memory = MemoryStore(tmp_path / "slots")
    storage = Storage(tmp_path / "checkpoints", layout=PLAIN, timeout=config.timeout)
    event_log = EventLog(tmp_path)
    snapshots = SnapshotWriter(config, memory, event_log)
    checkpointer = Checkpointer(config, storage, event_log, {}, snapshots, report_waiting=report_waiting)
    yield checkpointer, memory, reports
    checkpointer.snapshots.close()


HUNG = {
    "wait": [("save-failed", 1), ("save-failed", 2), ("save-failed", 3), ("save-failed", 4)],
    "skip": [("save-skipped", 2), ("save-failed", 1), ("save-failed", 3), ("save-failed", 4)],
    "drop-oldest": [("save-failed", 1), ("save-dropped", 2), ("save-dropped", 3)],
}


@pytest.mark.parametrize("saves", HUNG, indirect=True)
def test_a_save_that_never_ends_and_later_ones_are_logged_and_snapshots_go_on(tmp_path, saves, clock, stuck):
    checkpointer, memory, reports = saves
    for step in (1, 2, 3):
        checkpointer.start_save(small_state(step), step, samples=step, memory=True)
        wait_until(lambda step=step: (checkpointer.snapshots.poll(), checkpointer.snapshots.safe_step == step)[1])
        if step == 2:
            clock.now += 2.5  # more than `checkpoint.timeout`
        checkpointer.poll()
    checkpointer.save_final(small_state(4), 4, samples=4)
    with pytest.raises(StorageTimeout, match="hangs"):
        checkpointer.finish()
    with pytest.raises(StorageTimeout, match=r"checkpoint 1 .* 2 s \(checkpoint.timeout\)"):
        checkpointer.storage.close()
    assert has_stuck_writer()
    policy = checkpointer.config.when_busy
    assert events(tmp_path) == HUNG[policy] and bool(reports) == (policy == "wait")  # the launcher hears why it waits
    assert memory.newest_step == 3  # a restart goes on from there
    stuck.set()
    wait_until(lambda: not has_stuck_writer())


@pytest.mark.parametrize("saves", ["wait"], indirect=True)
def test_storage_that_answers_again_commits_what_hung_and_what_comes_after(tmp_path, saves, stuck):
    checkpointer, _, _ = saves
    checkpointer.start_save(small_state(1), 1, samples=1)
    checkpointer.start_save(small_state(2), 2, samples=2)
    stuck.set()
    wait_until(lambda: not checkpointer.storage.saving)
    checkpointer.poll()
    assert checkpointer.failure is not None  # of step 2, which is nowhere
    checkpointer.save_final(small_state(3), 3, samples=3)
    checkpointer.finish()
    checkpointer.storage.close()
    assert events(tmp_path) == [("save-failed", 1), ("save-failed", 2), ("commit", 1), ("commit", 3)]
    assert checkpointer.storage.steps == [1, 3] and not has_stuck_writer()


SHIM = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static void hang(int file) {
  char name[64], path[PATH_MAX] = {0};
  snprintf(name, sizeof name, "/proc/self/fd/%d", file);
  if (readlink(name, path, sizeof path - 1) > 0 && strstr(path, "checkpoints"))
    while (access(getenv("HANGS"), F_OK) == 0) usleep(10000);
}

int fsync(int file) { hang(file); return ((int (*)(int))dlsym(RTLD_NEXT, "fsync"))(file); }
int fdatasync(int file) { hang(file); return ((int (*)(int))dlsym(RTLD_NEXT, "fdatasync"))(file); }
"""
OPTIONS = (
    *SMALL,
    "steps=20",
    "mesh={devices: 1, data: 1, fsdp: 1, tensor: 1}",
    "name=run",
    "checkpoint={every: 5, keep: 99, memory_every: 1, timeout: 3, when_busy: skip}",
)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler, to make fsync hang")
def test_a_trainer_whose_fsync_never_returns_ends_and_goes_on_from_memory(tmp_path):
    """The program a user runs, every fsync below checkpoints/ caught in the system after the first commit."""
    (tmp_path / "shim.c").write_text(SHIM)
    library, hangs, run = tmp_path / "shim.so", tmp_path / "hangs", tmp_path / "runs" / "run"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, tmp_path / "shim.c", "-ldl"], check=True)
    variables = {
        "MESHWRIGHT_CACHE": str(tmp_path / "cache"),
        "XLA_FLAGS": "",
        "LD_PRELOAD": str(library),
        "HANGS": str(hangs),
    }
    command = [sys.executable, "-m", "meshwright.train.cli", "train", "quickstart", *OPTIONS]
    settings = {"cwd": tmp_path, "env": os.environ | variables, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    trainer = subprocess.Popen(command, **settings)
    wait_until(lambda: "commit" in [event["event"] for event in read_events(run)], process=trainer)
    hangs.touch()
    errors = trainer.communicate(timeout=120)[1].decode()
    assert trainer.returncode == 1 and "checkpoint.timeout" in errors
    failed = [event["step"] for event in read_events(run) if event["event"] == "save-failed"]
    assert failed and failed[-1] == 20
    hangs.unlink()
    assert subprocess.run(command, **settings, timeout=300, check=False).returncode == 0
    (restore,) = [event for event in read_events(run) if event["event"] == "restore"]
    # The newest commit is of step 5. A snapshot is left out while the one before is being written.
    assert restore["level"] == "memory" and restore["step"] > 15
