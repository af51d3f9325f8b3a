"""A disk or a memory that is full, errs, or is slow: real ones where the test may mount, else limits of files."""

import errno
import os
import resource
import signal
import subprocess

import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp
from support.plain_storage import PLAIN, restore, state_of

from meshwright.checkpoint.async_copy import donation_safe_copy
from meshwright.checkpoint.manifest import DamagedCheckpoint
from meshwright.checkpoint.memory_store import MemoryStore
from meshwright.checkpoint.storage import Storage
from meshwright.configs.errors import MeshwrightError, UserError
from meshwright.configs.sections.training import CheckpointConfig
from meshwright.train.checkpointer import Checkpointer
from meshwright.train.core.event_log import EventLog, read_events
from meshwright.train.core.fence import Fence
from meshwright.train.core.jsonl import read_rows
from meshwright.train.metrics.metric_sinks import JsonLines, TensorBoard
from meshwright.train.snapshot_writer import SnapshotWriter

DISK_BYTES = 2**20  # of the small disk


def state(size):
    """A state of `size` random bytes."""
    return state_of(np.random.default_rng(0).random(size // 4, np.float32))


@pytest.fixture
def small(tmp_path):
    """A disk of 1 MB; without the right to mount, files of at most 1 MB."""
    directory = tmp_path / "small"
    directory.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", directory], capture_output=True
    )
    if mount.returncode == 0:
        yield directory
        subprocess.run(["umount", "-l", directory], check=True)
        return
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (DISK_BYTES, before[1]))
    yield directory
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.fixture
def disk(tmp_path):
    """(a directory, a function that makes it read-only or writable): by a mount, else by its modes."""
    directory = tmp_path / "disk"
    directory.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "tmpfs", directory], capture_output=True).returncode == 0

    def remount(how):
        if mounted:
            subprocess.run(["mount", "-o", f"remount,{how}", directory], check=True)
        else:
            subprocess.run(["chmod", "-R", "a-w" if how == "ro" else "u+w", directory], check=True)

    yield directory, remount
    subprocess.run(["umount", "-l", directory] if mounted else ["chmod", "-R", "u+w", directory], check=True)


def test_storage_that_becomes_read_only_stops_nobody_and_no_line_is_lost(disk, tmp_path):
    directory, remount = disk
    config = CheckpointConfig(every=1, keep=1, memory_every=1)
    memory, event_log, metrics = (
        MemoryStore(tmp_path / "slots"),
        EventLog(directory),
        JsonLines(directory / "metrics.jsonl"),
    )
    storage, snapshots = Storage(directory / "checkpoints", layout=PLAIN), SnapshotWriter(config, memory, event_log)
    checkpointer = Checkpointer(config, storage, event_log, {}, snapshots)
    for step, how in ((1, "rw"), (2, "rw"), (3, "ro"), (4, "ro"), (5, "rw")):
        remount(how)
        checkpointer.start_save(state(1000), step, samples=step, memory=True)
        metrics.write(step, {"loss": 1.0})
        checkpointer.wait()
        assert (checkpointer.failure is not None) == (how == "ro")
        if how == "ro":
            assert "make it writable and run again" in str(checkpointer.failure) or os.geteuid() != 0
            assert storage.steps == [2] and [row["step"] for row in read_rows(metrics.path)] == [1, 2]
    assert memory.newest_step >= 4
    checkpointer.finish()
    storage.close()
    events = [(event["event"], event["step"]) for event in read_events(directory) if event["event"] != "save"]
    assert events == [("commit", 1), ("commit", 2), ("save-failed", 3), ("save-failed", 4), ("commit", 5)]
    assert [row["step"] for row in read_rows(metrics.path)] == [1, 2, 3, 4, 5]
    assert sorted(path.name for path in (directory / "checkpoints").iterdir()) == ["5"]


def test_a_run_whose_storage_is_read_only_at_its_end_fails_and_leaves_its_snapshots(disk, tmp_path):
    directory, remount = disk
    config = CheckpointConfig(memory_every=1)
    memory, event_log, storage = (
        MemoryStore(tmp_path / "slots"),
        EventLog(directory),
        Storage(directory / "checkpoints", layout=PLAIN),
    )
    checkpointer = Checkpointer(config, storage, event_log, {}, SnapshotWriter(config, memory, event_log))
    checkpointer.start_save(state(1000), 1, samples=8)
    checkpointer.wait()
    remount("ro")
    checkpointer.start_save(state(1000), 2, samples=16, storage=False, memory=True)
    checkpointer.save_final(state(1000), 3, samples=24)
    with pytest.raises(UserError, match="checkpoint 3 could not be written"):
        checkpointer.finish()
    checkpointer.snapshots.close()
    storage.close()
    assert storage.steps == [1] and memory.newest_step == 2
    with pytest.raises(UserError, match="cannot be written"):  # a restart says what is wrong
        Fence(directory, 2).claim()


def test_a_directory_that_cannot_be_written_from_the_start_is_the_users_mistake(disk):
    directory, remount = disk
    remount("ro")
    with pytest.raises(UserError, match=r"events.jsonl.*(Read-only|Permission)"):
        EventLog(directory).record("start", step=0)


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_charts_on_a_full_disk_end_with_one_warning_and_the_run_goes_on(small, caplog):
    charts = TensorBoard(small)
    for step in range(5):
        charts.write(step, {"a" * DISK_BYTES: 1.0})  # a record as large as the disk
    charts.close()
    (warning,) = caplog.messages
    assert "TensorBoard" in warning and "cannot be written" in warning


def test_a_full_disk_fails_the_save_and_leaves_the_one_before(small):
    storage = Storage(small / "checkpoints", layout=PLAIN)
    saved = state(100_000)
    storage.save(saved, step=1, data={})
    storage.wait()
    storage.save(state(4 * DISK_BYTES), step=2, data={})
    with pytest.raises(MeshwrightError, match="checkpoint 2 could not be written"):
        storage.wait()
    assert storage.steps == [1] and [path.name for path in (small / "checkpoints").iterdir()] == ["1"]
    np.testing.assert_array_equal(restore(storage, 1, saved)[0].params["a"], saved.params["a"])
    storage.save(saved, step=3, data={})  # what the failed one left has been deleted: there is room again
    storage.close()
    assert storage.steps == [1, 3]


def test_a_full_memory_ends_the_snapshots_not_the_run(small, tmp_path):
    memory = MemoryStore(small / "slots")
    snapshots = SnapshotWriter(CheckpointConfig(memory_every=1), memory, EventLog(tmp_path))
    assert snapshots.accepts(1)
    snapshots.start_snapshot(donation_safe_copy(state(4 * DISK_BYTES)), 1, data={}, stall=0.0)
    assert not snapshots.accepts(2) and not snapshots.accepts(3)
    snapshots.close()
    (event,) = read_events(tmp_path)
    assert (event["event"], event["level"]) == ("save-failed", "memory") and memory.newest_step == -1


def failing(code):
    def fail(*_, **__):
        raise OSError(code, "Input/output error")

    return fail


def test_an_error_of_the_disk_while_writing_is_logged_and_the_next_save_is_whole(tmp_path, monkeypatch):
    storage = Storage(tmp_path / "checkpoints", layout=PLAIN)
    checkpointer = Checkpointer(CheckpointConfig(every=1), storage, EventLog(tmp_path), {})
    monkeypatch.setattr(ocp, "save_async", failing(errno.EIO))
    checkpointer.start_save(state(1000), 1, samples=8)
    checkpointer.wait()
    monkeypatch.undo()
    checkpointer.save_final(state(1000), 2, samples=16)
    checkpointer.finish()
    assert [(event["event"], event["step"]) for event in read_events(tmp_path)] == [
        ("save", 1), ("save-failed", 1), ("save", 2), ("commit", 2),
    ]  # fmt: skip
    storage.close()


def test_an_error_of_the_disk_while_reading_is_damage(tmp_path, monkeypatch):
    storage, saved = Storage(tmp_path / "checkpoints", layout=PLAIN), state(1000)
    storage.save(saved, step=1, data={})
    storage.close()
    monkeypatch.setattr(ocp, "load", failing(errno.EIO))
    with pytest.raises(DamagedCheckpoint, match=r"cannot be read.*Input/output error"):
        restore(storage, 1, saved)


def test_a_full_disk_says_what_to_do(tmp_path, monkeypatch):
    storage = Storage(tmp_path / "checkpoints", layout=PLAIN)
    monkeypatch.setattr(ocp, "save_async", failing(errno.ENOSPC))
    storage.save(state(1000), step=1, data={})
    with pytest.raises(UserError, match="free some space and run again"):
        storage.wait()
    storage.close()
