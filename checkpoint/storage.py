"""Checkpoints on the storage of a run: asynchronous saves by Orbax, and verified restores to any mesh and layout.

A checkpoint holds the arrays of the state by path (params/..., opt_state/..., step, rng), which do not depend on the
mesh, and a manifest with a fingerprint of every block of every logical array. The manifest is written last and commits
the checkpoint. What is read is compared with it, so nothing damaged is returned.
"""

import errno
import gc
import logging
import sys
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict
from jax.sharding import NamedSharding, PartitionSpec
from orbax.checkpoint import v1 as ocp

from ..configs.errors import MeshwrightError, UserError, first_line
from ..parallel.sharding import path_name
from ..parallel.state import TrainState
from . import manifest as manifests
from .checkpoint_directory import CheckpointDirectory
from .integrity import describe, prepare_description, verify_arrays
from .layout_conversion import Layout, convert_arrays
from .manifest import DamagedCheckpoint, Manifest
from .storage_timeout import WRITER, StorageTimeout

HASHING_TIMEOUT = 300.0  # seconds to wait for the fingerprints of the other processes
SAVE_TIMEOUT = 600.0  # seconds
SAVED_FIELDS = ("step", "params", "opt_state", "outer", "rng")  # without `frozen`, which never changes


@dataclass(frozen=True)
class SaveStats:
    """Costs of a save, which runs beside training. The checkpointer logs the fields by their names."""

    copy: float = 0.0  # seconds until the copy was on the host
    fingerprint: float = 0.0  # seconds of hashing, beside the writing
    flush: float = 0.0  # seconds until everything was written
    bytes: int = 0  # written by this process


class Storage:
    """The checkpoints of one run under `directory`, in the layout of the run.

    `check_allowed` is called before anything is written, and raises if this process may not write: it is of an older
    epoch. `timeout`: seconds after which a save is no longer waited for.
    """

    def __init__(
        self,
        directory: Path,
        *,
        layout: Layout,
        check_allowed: Callable[[], None] = lambda: None,
        timeout: float = SAVE_TIMEOUT,
    ):
        for logger in ("absl", "asyncio"):  # Orbax logs every save, and every array of a failed read
            logging.getLogger(logger).setLevel(logging.CRITICAL)
        self.checkpoints = CheckpointDirectory(directory.absolute())
        self._layout = layout
        self._check_allowed, self._timeout = check_allowed, timeout
        self._pending: tuple[int, Future] | None = None  # (step, completion) of the save under way
        self._started_at = 0.0
        self._saved: set[int] = set()  # steps saved in this session
        self._writer = ThreadPoolExecutor(1, WRITER)
        self.save_stats = SaveStats()  # of the last save

    @property
    def steps(self) -> list[int]:
        """Committed steps, oldest first."""
        return self.checkpoints.steps

    def save(self, state: TrainState, *, step: int, data: Mapping[str, Any]) -> None:
        """Start to save `state` after `step` updates, with `data` as JSON.

        The arrays must not change until the save has finished: training saves a copy (`async_copy.py`). Waits for the
        previous save. Raises MeshwrightError if that or the start of this one failed, StorageTimeout if it hangs.
        """
        self.wait()
        if step in self._saved:  # not `self.steps`: only process 0 writes manifests, and all must decide the same
            return
        self._check_allowed()
        self._saved.add(step)
        self._started_at = time.monotonic()
        start = partial(self._start_writing, saved_tree(state), step, data)
        if jax.process_count() == 1:
            self._pending = (step, self._writer.submit(lambda: start()()))
            return
        try:  # collectives of Orbax and of hashing must run in the same order as all others: on this thread
            self._pending = (step, self._writer.submit(start()))
        except Exception as error:
            raise self._clean_up_failure(step, error) from error

    def _start_writing(self, arrays: dict[str, Any], step: int, data: Mapping[str, Any]) -> Callable[[], None]:
        """Start to write, and return a function that finishes the save on any thread."""
        start = time.monotonic()
        if jax.process_index() == 0:
            self.checkpoints.begin(step, processes=jax.process_count())
        build_manifest = prepare_description(flatten_paths(arrays), step=step, layout=self._layout, data=data)
        copy_seconds = time.monotonic() - start
        response = ocp.save_async(self.checkpoints.path(step), arrays)
        size = sum(shard.data.nbytes for leaf in flatten_paths(arrays).values() for shard in leaf.addressable_shards)

        def finish() -> None:
            hashing_start = time.monotonic()
            try:
                part = build_manifest()
                hash_seconds = time.monotonic() - hashing_start
                self.checkpoints.write_part(part, process=jax.process_index())
            finally:
                response.result()  # after a failure too: nothing may still be written when the files are deleted
            self._check_allowed()
            if jax.process_index() == 0:
                self.checkpoints.commit(step, timeout=HASHING_TIMEOUT)
            self.save_stats = SaveStats(copy_seconds, hash_seconds, time.monotonic() - start, size)

        return finish

    @property
    def pending_step(self) -> int | None:
        """The step of the save under way; None: there is none."""
        return None if self._pending is None else self._pending[0]

    @property
    def finished(self) -> bool:
        """Whether the save under way has succeeded or failed, so that `wait` returns at once."""
        return self._pending is not None and self._pending[1].done()

    @property
    def saving(self) -> bool:
        """Whether a save is under way."""
        return self._pending is not None and not self.finished

    @property
    def timed_out(self) -> bool:
        """Whether the save under way has exceeded the timeout."""
        return self.saving and time.monotonic() > self._started_at + self._timeout

    def still_saving_after(self, seconds: float) -> bool:
        """Wait up to `seconds` for the save under way; return whether it still goes on, within the timeout."""
        if not self.saving or self.timed_out:
            return False
        futures.wait([self._pending[1]], min(seconds, self._started_at + self._timeout - time.monotonic()))
        return self.saving and not self.timed_out

    def wait(self) -> int | None:
        """Wait for the save under way, and return its step, or None. Raises MeshwrightError if it failed.

        Raises StorageTimeout if it exceeds the timeout. The save stays under way: if the storage recovers, it finishes
        like any other.
        """
        if self._pending is None:
            return None
        step, future = self._pending
        while self.still_saving_after(self._timeout):
            pass
        if not future.done():
            raise StorageTimeout(
                f"checkpoint {step} was not written to {self.checkpoints.directory} within {self._timeout:g} s "
                "(checkpoint.timeout): the storage hangs; repair it, or raise the timeout"
            )
        self._pending = None
        try:
            future.result()
        except Exception as error:
            raise self._clean_up_failure(step, error) from error
        return step

    def restore(self, step: int, *, shapes: TrainState, shardings: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """Return the state saved at `step` on `shardings`, and the data saved with it. `shapes`: what the run expects.

        Raises UserError if the checkpoint has the arrays of another model, DamagedCheckpoint if it differs from what
        was saved or cannot be read.
        """
        manifest = manifests.read(self.checkpoints.path(step))
        shape_of, sharding_of = flatten_paths(saved_tree(shapes)), flatten_paths(saved_tree(shardings))
        check_compatible(shape_of, manifest, layout=self._layout)
        same_arrays = {path: [list(leaf.shape), str(leaf.dtype)] for path, leaf in shape_of.items()} == manifest.stored
        direct = same_arrays and manifest.layout == self._layout.name
        mesh = next(iter(sharding_of.values())).mesh
        loaded = load(self.checkpoints, manifest, sharding_of if direct else shard_evenly(manifest, mesh))
        verify_arrays(loaded, manifest, where=self.checkpoints.path(step))
        if not direct:
            convert = jax.jit(
                lambda stored: convert_arrays(stored, manifest, shapes=shape_of, layout=self._layout),
                out_shardings=sharding_of,
            )
            loaded = convert(loaded)
        leaves = [loaded.get(name) for name in flatten_paths(shapes)]
        return jax.tree.unflatten(jax.tree.structure(shapes), leaves), manifest.data

    def delete_except(self, steps: Collection[int]) -> None:
        """Delete all committed checkpoints except those of `steps`."""
        self._check_allowed()
        for step in set(self.steps) - set(steps):
            self.checkpoints.remove(step)

    def close(self) -> None:
        """Wait for the save under way and release the writer thread, even if that hangs (`storage_timeout.py`)."""
        try:
            self.wait()
        finally:
            self._writer.shutdown(wait=not self.saving)

    def _clean_up_failure(self, step: int, error: Exception) -> MeshwrightError:
        """Delete what a failed save left behind, so that its space is free again; return the error to raise."""
        self._saved.discard(step)
        with suppress(MeshwrightError):  # a process of an older epoch must not delete files of a later one
            self._check_allowed()
            if jax.process_index() == 0:
                self.checkpoints.discard(step)
        return save_error(step, self.checkpoints.directory, error)


def load(checkpoints: CheckpointDirectory, manifest: Manifest, shardings: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Load the arrays of a checkpoint by path, as stored, unverified. Raises DamagedCheckpoint if that fails."""
    shapes = {
        path: jax.ShapeDtypeStruct(tuple(shape), jnp.dtype(dtype), sharding=shardings[path])
        for path, (shape, dtype) in manifest.stored.items()
    }
    with silence_abandoned_reads():
        try:
            return flatten_paths(ocp.load(checkpoints.path(manifest.step), unflatten_dict(shapes, sep="/")))
        except MemoryError:
            raise
        except Exception as error:
            if "RESOURCE_EXHAUSTED" in str(error):  # this machine has too little memory; the checkpoint may be fine
                raise
            reason = first_line(error)
        gc.collect(1)
    raise DamagedCheckpoint(f"checkpoint {manifest.step} in {checkpoints.directory} cannot be read: {reason}")


@contextmanager
def silence_abandoned_reads() -> Iterator[None]:
    """Silence the warnings of reads that a failed read abandons; collect these reads in the `with`."""
    previous = sys.unraisablehook
    sys.unraisablehook = lambda _: None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            yield
    finally:
        sys.unraisablehook = previous


def shard_evenly(manifest: Manifest, mesh: jax.sharding.Mesh) -> dict[str, NamedSharding]:
    """Return a sharding for every stored array: its longest divisible dimension over all devices."""
    result = {}
    for path, (shape, _) in manifest.stored.items():
        divisible = [dimension for dimension, size in enumerate(shape) if size % mesh.size == 0]
        longest = max(divisible, key=lambda dimension: shape[dimension], default=None)
        spec = [mesh.axis_names if dimension == longest else None for dimension in range(len(shape))]
        result[path] = NamedSharding(mesh, PartitionSpec(*spec))
    return result


def saved_tree(state: TrainState) -> dict[str, Any]:
    """Return the saved fields of `state` as nested dicts, so that files do not depend on the state classes of optax."""
    leaves = {path: leaf for path, leaf in flatten_paths(state).items() if path.split("/")[0] in SAVED_FIELDS}
    return unflatten_dict(leaves, sep="/")


def flatten_paths(nest: Any) -> dict[str, Any]:
    """Return path -> leaf of a tree."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(nest)}


def check_compatible(shapes: Mapping[str, Any], manifest: Manifest, *, layout: Layout) -> None:
    """Raise UserError if names, shapes or dtypes of the logical arrays in `manifest` differ from those of `shapes`."""
    saved = {name: f"{tuple(entry.shape)} {entry.dtype}" for name, entry in manifest.arrays.items()}
    expected = {
        name: f"{tuple(entry.shape)} {entry.dtype}"
        for name, entry in describe(shapes, step=manifest.step, layout=layout, data={}).arrays.items()
    }
    for name in sorted(expected.keys() | saved.keys()):
        if expected.get(name) != saved.get(name):
            raise UserError(
                f"checkpoint {manifest.step}: {name} is {saved.get(name, 'absent')} on disk and "
                f"{expected.get(name, 'absent')} in this run; choose another name, or undo that change"
            )


def save_error(step: int, directory: Path, error: Exception) -> MeshwrightError:
    """Return the error to raise for a failed save, with a remedy if there is one."""
    message = f"checkpoint {step} could not be written to {directory}: {first_line(error)}"
    if "No space left" in str(error) or getattr(error, "errno", None) == errno.ENOSPC:
        return UserError(f"{message}; free some space and run again: earlier checkpoints are intact")
    if "Read-only file system" in str(error) or getattr(error, "errno", None) == errno.EROFS:
        return UserError(f"{message}; make it writable and run again: earlier checkpoints are intact")
    return MeshwrightError(message)
