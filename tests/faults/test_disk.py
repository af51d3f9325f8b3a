"""A disk or a memory that is full, errs, or is slow: real ones where the test may mount, else limits of files."""

import errno
import resource
import signal
import subprocess

import jax
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from meshwright.checkpoint.copies import independent
from meshwright.checkpoint.layouts import Layout
from meshwright.checkpoint.manifest import DamagedCheckpoint
from meshwright.checkpoint.memory import Memory
from meshwright.checkpoint.storage import Storage
from meshwright.configs.errors import MeshwrightError, UserError
from meshwright.configs.training import CheckpointConfig
from meshwright.parallel.state import TrainState
from meshwright.train.report.journal import Journal, read_events
from meshwright.train.saving import Saving
from meshwright.train.snapshots import Snapshots

PLAIN = Layout("plain", lambda path, shape: [(path, ())])
ROOM = 2**20  # bytes of the small disk


def state(size):
    draw = np.random.default_rng(0)
    whole = TrainState(np.int32(1), {"a": draw.random(size // 4, np.float32)}, {}, (), (), np.zeros(2, np.uint32))
    return jax.device_put(whole, jax.devices()[0])


def restored(storage, step, saved):
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), saved)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("x",))
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    return storage.restore(step, shapes=shapes, shardings=jax.tree.map(lambda _: place, shapes))[0]


@pytest.fixture
def small(tmp_path):
    """A disk of 1 MB; without the right to mount, files of at most 1 MB."""
    place = tmp_path / "small"
    place.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={ROOM}", "tmpfs", place], capture_output=True)
    if mount.returncode == 0:
        yield place
        subprocess.run(["umount", "-l", place], check=True)
        return
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (ROOM, before[1]))
    yield place
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_fails_the_save_and_leaves_the_one_before(small):
    storage = Storage(small / "checkpoints", layout=PLAIN)
    saved = state(100_000)
    storage.save(saved, step=1, data={})
    storage.wait()
    storage.save(state(4 * ROOM), step=2, data={})
    with pytest.raises(MeshwrightError, match="checkpoint 2 could not be written"):
        storage.wait()
    assert storage.steps == [1] and [path.name for path in (small / "checkpoints").iterdir()] == ["1"]
    np.testing.assert_array_equal(restored(storage, 1, saved).params["a"], saved.params["a"])
    storage.save(saved, step=3, data={})  # what the failed one left has been deleted: there is room again
    storage.close()
    assert storage.steps == [1, 3]


def test_a_full_memory_ends_the_snapshots_not_the_run(small, tmp_path):
    memory = Memory(small / "slots")
    snapshots = Snapshots(CheckpointConfig(memory_every=1), memory, Journal(tmp_path))
    assert snapshots.takes(1)
    snapshots.begin(independent(state(4 * ROOM)), 1, data={}, stall=0.0)
    assert not snapshots.takes(2) and not snapshots.takes(3)
    snapshots.close()
    (event,) = read_events(tmp_path)
    assert (event["event"], event["level"]) == ("save-failed", "memory") and memory.newest == -1


def failing(number):
    def fail(*_, **__):
        raise OSError(number, "Input/output error")

    return fail


def test_an_error_of_the_disk_while_writing_is_journalled_and_the_next_save_is_whole(tmp_path, monkeypatch):
    storage = Storage(tmp_path / "checkpoints", layout=PLAIN)
    saving = Saving(CheckpointConfig(every=1), storage, Journal(tmp_path), {})
    monkeypatch.setattr(ocp, "save_async", failing(errno.EIO))
    saving.begin(state(1000), 1, samples=8)
    saving.settle()
    monkeypatch.undo()
    saving.last(state(1000), 2, samples=16)
    saving.finish()
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
        restored(storage, 1, saved)


def test_a_full_disk_says_what_to_do(tmp_path, monkeypatch):
    storage = Storage(tmp_path / "checkpoints", layout=PLAIN)
    monkeypatch.setattr(ocp, "save_async", failing(errno.ENOSPC))
    storage.save(state(1000), step=1, data={})
    with pytest.raises(UserError, match="free some space and run again"):
        storage.wait()
    storage.close()
