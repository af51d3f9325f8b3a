"""Back-pressure: a save is due while the one before it is unfinished. What each policy does, in storage and memory."""

import threading

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from orbax.checkpoint import v1 as ocp
from support.waiting import wait_until

from meshwright.checkpoint.async_copy import donation_safe_copy
from meshwright.checkpoint.layout_conversion import Layout
from meshwright.checkpoint.memory_store import MemoryStore
from meshwright.checkpoint.redundancy.agent_files import ProtectedStep, write_status
from meshwright.checkpoint.storage import Storage, flatten_paths, saved_tree
from meshwright.configs.sections.training import CheckpointConfig
from meshwright.parallel.state import TrainState
from meshwright.train import checkpointer as checkpointer_module
from meshwright.train import snapshot_writer
from meshwright.train.checkpointer import Checkpointer
from meshwright.train.core.event_log import EventLog, read_events
from meshwright.train.snapshot_writer import SnapshotWriter

PLAIN = Layout("plain", lambda path, shape: [(path, ())])


def state(step):
    mesh = Mesh(np.array(jax.devices()[:2]), ("x",))
    whole = TrainState(np.int32(step), {"a": np.full((8, 4), step, np.float32)}, {}, (), (), np.zeros(2, np.uint32))
    return jax.device_put(whole, NamedSharding(mesh, PartitionSpec()))


class Slow:
    """Orbax's response, which waits for the gate."""

    def __init__(self, response, gate):
        self._response, self._gate = response, gate

    def result(self):
        assert self._gate.wait(30)
        return self._response.result()


@pytest.fixture
def gate(monkeypatch):
    """A slow disk: nothing is written before `gate.set()`."""
    gate, save = threading.Event(), ocp.save_async
    monkeypatch.setattr(ocp, "save_async", lambda *args: Slow(save(*args), gate))
    return gate


def checkpointer(root, policy, snapshots=None):
    config = CheckpointConfig(every=1, keep=99, when_busy=policy, memory_every=1)
    return Checkpointer(config, Storage(root / "checkpoints", layout=PLAIN), EventLog(root), {}, snapshots)


def events(root):
    return [(event["event"], event["step"]) for event in read_events(root)]


def test_a_copy_survives_the_donation_of_the_original():
    original = state(3)
    copy = donation_safe_copy(original)
    second = donation_safe_copy(copy)  # of arrays that are on the host already
    jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf + 1, tree), donate_argnums=0)(original)
    assert original.params["a"].is_deleted()
    for tree in (copy, second):
        np.testing.assert_array_equal(tree.params["a"], np.full((8, 4), 3))
    assert copy.params["a"] is not second.params["a"] and copy.params["a"].sharding.memory_kind == "pinned_host"


def test_wait_blocks_training_until_the_disk_is_free(tmp_path, gate, monkeypatch):
    monkeypatch.setattr(checkpointer_module, "REPORT_SECONDS", 0.01)
    saves = checkpointer(tmp_path, "wait")
    saves.report_waiting = lambda text: gate.set()
    saves.start_save(state(1), 1, samples=8)
    saves.start_save(state(2), 2, samples=16)
    saves.finish()
    assert events(tmp_path) == [("save", 1), ("commit", 1), ("save", 2), ("commit", 2)]
    commit = next(event for event in read_events(tmp_path) if event["event"] == "commit")
    assert commit["flush_seconds"] > 0 and commit["bytes"] == 8 * 4 * 4 * 2 + 3 * 4 * 2
    saves.storage.close()


def test_skip_drops_a_save_that_comes_too_early(tmp_path, gate):
    saves = checkpointer(tmp_path, "skip")
    for step in (1, 2, 3):
        saves.start_save(state(step), step, samples=8 * step)
    gate.set()
    saves.save_final(state(4), 4, samples=32)  # the last one is never left out
    saves.finish()
    assert events(tmp_path) == [
        ("save", 1), ("save-skipped", 2), ("save-skipped", 3), ("commit", 1), ("save", 4), ("commit", 4),
    ]  # fmt: skip
    saves.storage.close()


def test_drop_oldest_writes_the_newest_queued_save(tmp_path, gate):
    saves = checkpointer(tmp_path, "drop-oldest")
    for step in (1, 2, 3):
        saves.start_save(state(step), step, samples=8 * step)
        saves.poll()
    gate.set()
    wait_until(lambda: (saves.poll(), 3 in saves.start_times)[1])
    saves.finish()
    assert events(tmp_path) == [("save", 1), ("save-dropped", 2), ("commit", 1), ("save", 3), ("commit", 3)]
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state(0))
    found, data = saves.storage.restore(3, shapes=jax.eval_shape(lambda: state(0)), shardings=shardings)
    assert data == {"samples": 24} and np.all(found.params["a"] == 3)
    saves.storage.close()


@pytest.mark.parametrize(
    ("policy", "written", "recorded"),
    [("wait", [1, 2, 3], []), ("skip", [1], ["save-skipped"] * 2), ("drop-oldest", [1, 3], ["save-dropped"])],
)
def test_snapshots_in_memory_follow_the_same_policy(tmp_path, monkeypatch, policy, written, recorded):
    config = CheckpointConfig(memory_every=1, when_busy=policy)
    memory, gate, saved, save = MemoryStore(tmp_path / "slots"), threading.Event(), [], MemoryStore.save
    first_write = threading.Event()

    def slow_save(self, copy, *, step, data, keep_step):
        first_write.set()
        assert gate.wait(30)
        saved.append(step)
        return save(self, copy, step=step, data=data, keep_step=keep_step)

    monkeypatch.setattr(MemoryStore, "save", slow_save)
    snapshots = SnapshotWriter(config, memory, EventLog(tmp_path))
    if policy == "wait":
        threading.Timer(0.2, gate.set).start()
    for step in (1, 2, 3):
        if snapshots.accepts(step):
            snapshots.start_snapshot(donation_safe_copy(state(step)), step, data={}, stall=0.0)
        assert first_write.wait(30)
    gate.set()
    snapshots.close()
    assert saved == written and [event["event"] for event in read_events(tmp_path)] == recorded
    assert memory.newest_step == written[-1]


def test_a_protected_snapshot_is_not_overwritten_before_a_newer_one_is(tmp_path, monkeypatch):
    """Snapshot agents never protect step 2: training goes on after a time-out, and step 1 is never overwritten."""
    monkeypatch.setattr(snapshot_writer, "PROTECTION_TIMEOUT", 0.1)
    memory = MemoryStore(tmp_path / "slots")
    snapshots = SnapshotWriter(CheckpointConfig(memory_every=1, parity="xor"), memory, EventLog(tmp_path))
    for step in range(1, 6):
        assert snapshots.accepts(step)
        snapshots.start_snapshot(donation_safe_copy(state(step)), step, data={}, stall=0.0)
        if step == 1:
            write_status(memory.directory, ProtectedStep(1))
    snapshots.close()
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state(0))
    arrays = [flatten_paths(saved_tree(tree)) for tree in (shardings, jax.eval_shape(lambda: state(0)))]
    assert sorted(memory.usable_steps(*arrays)) == [1, 5]
    assert [(event["event"], event["step"]) for event in read_events(tmp_path)] == [("unprotected", 2)]


def test_a_rewind_quarantines_later_checkpoints_and_deletes_later_snapshots(tmp_path):
    snapshots = SnapshotWriter(CheckpointConfig(memory_every=1), MemoryStore(tmp_path / "memory"), EventLog(tmp_path))
    saves = checkpointer(tmp_path, "wait", snapshots)
    for step in (2, 4, 6):
        saves.start_save(state(step), step, samples=step, memory=True)
    saves.wait()
    saves.storage.close()
    saves = checkpointer(tmp_path, "wait", snapshots)  # the next session, which finds the other islands behind
    saves.rewind(state(3), 3, samples=3)
    assert saves.storage.steps == [2, 3] and saves.storage.checkpoints.quarantined == ["4", "6"]
    assert events(tmp_path)[-4:] == [("quarantine", 4), ("quarantine", 6), ("save", 3), ("commit", 3)]
    assert MemoryStore(tmp_path / "memory").newest_step < 4
    saves.start_save(state(4), 4, samples=4)
    saves.finish()
    assert saves.storage.steps == [2, 3, 4]
    saves.storage.close()
