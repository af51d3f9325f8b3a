"""Whole states on the run's storage: asynchronous saves by Orbax, verified, and the way back onto any mesh and layout.

A checkpoint holds the state by path (params/..., opt_state/..., step, rng) in arrays that no mesh shape changes, and a
manifest with a fingerprint of every block of every logical array. The manifest is written last: a checkpoint without
one is none. What is read is compared with it, so nothing damaged is returned.
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

PATIENCE = 300.0  # seconds for the other processes to finish hashing
TIMEOUT = 600.0  # seconds for a save
SAVED = ("step", "params", "opt_state", "outer", "rng")  # `frozen` never changes


@dataclass(frozen=True)
class SaveStats:
    """What a save took beside training."""

    copy: float = 0.0  # seconds until the copy was on the host
    fingerprint: float = 0.0  # seconds of hashing, beside the writing
    flush: float = 0.0  # seconds until everything was written
    bytes: int = 0  # of this process


class Storage:
    """Checkpoints of one run under `directory`, in the run's `layout`.

    `allowed` is asked before anything is written and raises where this process may not: one of an older membership.
    `timeout`: seconds after which a save that has not ended is waited for no longer.
    """

    def __init__(
        self,
        directory: Path,
        *,
        layout: Layout,
        check_allowed: Callable[[], None] = lambda: None,
        timeout: float = TIMEOUT,
    ):
        for narrator in ("absl", "asyncio"):  # Orbax narrates every save, and every array of a failed read
            logging.getLogger(narrator).setLevel(logging.CRITICAL)
        self.checkpoints = CheckpointDirectory(directory.absolute())
        self._layout = layout
        self._allowed, self._timeout = check_allowed, timeout
        self._pending: tuple[int, Future] | None = None
        self._began = 0.0  # when the save under way did
        self._saved: set[int] = set()  # in this sitting
        self._waiter = ThreadPoolExecutor(1, WRITER)
        self.save_stats = SaveStats()  # on the last save, beside training

    @property
    def steps(self) -> list[int]:
        """Committed steps, oldest first."""
        return self.checkpoints.steps

    def save(self, state: TrainState, *, step: int, data: Mapping[str, Any]) -> None:
        """Begin to save `state` after `step` updates. `data` is JSON.

        The arrays must stay as they are until the save has ended: where training goes on, save a copy (`copies.py`).
        Waits for the save before it. Raises MeshwrightError where that one or the beginning of this one failed,
        StorageHangs where that one does not end.
        """
        self.wait()
        if step in self._saved:  # not `steps`: only the first process writes manifests, and all must answer alike
            return
        self._allowed()
        self._saved.add(step)
        self._began = time.monotonic()
        begin = partial(self._begun, saved_tree(state), step, data)
        if jax.process_count() == 1:
            self._pending = (step, self._waiter.submit(lambda: begin()()))
            return
        try:  # Orbax and the hashing speak to the other processes by the devices: in the order of all else they do
            self._pending = (step, self._waiter.submit(begin()))
        except Exception as error:
            raise self._failed(step, error) from error

    def _begun(self, saved: dict[str, Any], step: int, data: Mapping[str, Any]) -> Callable[[], None]:
        """Begin to write; what is left to do, on any thread."""
        began = time.monotonic()
        if jax.process_index() == 0:
            self.checkpoints.begin(step, processes=jax.process_count())
        describe = prepare_description(flatten_paths(saved), step=step, layout=self._layout, data=data)
        copied = time.monotonic() - began
        response = ocp.save_async(self.checkpoints.path(step), saved)
        size = sum(shard.data.nbytes for leaf in flatten_paths(saved).values() for shard in leaf.addressable_shards)

        def ended() -> None:
            hashing = time.monotonic()
            try:
                part = describe()
                hashed = time.monotonic() - hashing
                self.checkpoints.write_part(part, process=jax.process_index())
            finally:
                response.result()  # whatever has failed, nobody writes any more when it is cleared away
            self._allowed()
            if jax.process_index() == 0:
                self.checkpoints.commit(step, patience=PATIENCE)
            self.save_stats = SaveStats(copied, hashed, time.monotonic() - began, size)

        return ended

    @property
    def pending_step(self) -> int | None:
        """The step whose save is under way."""
        return None if self._pending is None else self._pending[0]

    @property
    def finished(self) -> bool:
        """Whether the save under way has ended, well or not: `wait` will not."""
        return self._pending is not None and self._pending[1].done()

    @property
    def saving(self) -> bool:
        """Whether a save is under way."""
        return self._pending is not None and not self.finished

    @property
    def timed_out(self) -> bool:
        """Whether the save under way should have ended."""
        return self.saving and time.monotonic() > self._began + self._timeout

    def still_saving_after(self, seconds: float) -> bool:
        """Whether a save will still be under way in so many seconds, and in time; waits to see."""
        if not self.saving or self.timed_out:
            return False
        futures.wait([self._pending[1]], min(seconds, self._began + self._timeout - time.monotonic()))
        return self.saving and not self.timed_out

    def wait(self) -> int | None:
        """Wait for the save under way; its step, or None. Raises MeshwrightError where it failed.

        Raises StorageHangs where it has not ended in time. It stays under way: where the storage answers again after
        all, it ends as any other.
        """
        if self._pending is None:
            return None
        step, future = self._pending
        while self.still_saving_after(self._timeout):
            pass
        if not future.done():
            raise StorageTimeout(
                f"checkpoint {step} has not been written to {self.checkpoints.directory} within {self._timeout:g} s "
                "(checkpoint.timeout): the storage hangs"
            )
        self._pending = None
        try:
            future.result()
        except Exception as error:
            raise self._failed(step, error) from error
        return step

    def restore(self, step: int, *, shapes: TrainState, shardings: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """The state saved at `step`, placed by `shardings`, and the data's integers. `shapes` is what the run expects.

        Raises UserError where the checkpoint holds another model's arrays, DamagedCheckpoint where it is not what was
        saved, or cannot be read.
        """
        manifest = manifests.read(self.checkpoints.path(step))
        wanted = flatten_paths(saved_tree(shapes))
        placed = flatten_paths(saved_tree(shardings))
        check_compatible(wanted, manifest, layout=self._layout)
        alike = {path: [list(leaf.shape), str(leaf.dtype)] for path, leaf in wanted.items()} == manifest.stored
        direct = alike and manifest.layout == self._layout.name
        mesh = next(iter(placed.values())).mesh
        loaded = load(self.checkpoints, manifest, placed if direct else shard_evenly(manifest, mesh))
        verify_arrays(loaded, manifest, where=self.checkpoints.path(step))
        if not direct:
            convert = jax.jit(
                lambda stored: convert_arrays(stored, manifest, shapes=wanted, layout=self._layout),
                out_shardings=placed,
            )
            loaded = convert(loaded)
        leaves = [loaded.get(name) for name in leaf_paths(shapes)]
        return jax.tree.unflatten(jax.tree.structure(shapes), leaves), manifest.data

    def delete_except(self, steps: Collection[int]) -> None:
        """Delete the committed checkpoints of other steps."""
        self._allowed()
        for step in set(self.steps) - set(steps):
            self.checkpoints.remove(step)

    def close(self) -> None:
        """Wait for what is under way, and let go; of a thread that hangs, too (`hanging.py`)."""
        try:
            self.wait()
        finally:
            self._waiter.shutdown(wait=not self.saving)

    def _failed(self, step: int, error: Exception) -> MeshwrightError:
        """What to raise for a save that did not happen; what it left is deleted, so that its space is free again."""
        self._saved.discard(step)
        with suppress(MeshwrightError):  # one of an older membership: what is unfinished there is another's
            self._allowed()
            if jax.process_index() == 0:
                self.checkpoints.discard(step)
        return save_error(step, self.checkpoints.directory, error)


def load(shelf: CheckpointDirectory, manifest: Manifest, shardings: Mapping[str, Any]) -> dict[str, jax.Array]:
    """The arrays of a checkpoint by path, as stored, unverified. Raises DamagedCheckpoint where one is missing."""
    abstract = unflatten_paths(
        {
            path: jax.ShapeDtypeStruct(tuple(shape), jnp.dtype(dtype), sharding=shardings[path])
            for path, (shape, dtype) in manifest.stored.items()
        }
    )
    with silence_abandoned_reads():
        try:
            return flatten_paths(ocp.load(shelf.path(manifest.step), abstract))
        except MemoryError:
            raise
        except Exception as error:
            if "RESOURCE_EXHAUSTED" in str(error):  # this machine's memory, not the checkpoint's fault
                raise
            why = first_line(error)
        gc.collect(1)
    raise DamagedCheckpoint(f"checkpoint {manifest.step} in {shelf.directory} cannot be read: {why}")


@contextmanager
def silence_abandoned_reads() -> Iterator[None]:
    """A failed read leaves other reads behind that nobody waits for: collect them here, unheard."""
    before = sys.unraisablehook
    sys.unraisablehook = lambda _: None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            yield
    finally:
        sys.unraisablehook = before


def shard_evenly(manifest: Manifest, mesh: jax.sharding.Mesh) -> dict[str, NamedSharding]:
    """A sharding for every stored array, whatever its layout: its longest divisible dimension over all devices."""
    result = {}
    for path, (shape, _) in manifest.stored.items():
        dividable = [dimension for dimension, size in enumerate(shape) if size % mesh.size == 0]
        longest = max(dividable, key=lambda dimension: shape[dimension], default=None)
        spec = [mesh.axis_names if dimension == longest else None for dimension in range(len(shape))]
        result[path] = NamedSharding(mesh, PartitionSpec(*spec))
    return result


def saved_tree(state: TrainState) -> dict[str, Any]:
    """The saved part as nested dicts by path: what is on disk does not depend on any library's state classes."""
    saved = {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state)}
    return unflatten_paths({path: leaf for path, leaf in saved.items() if path.split("/")[0] in SAVED})


def unflatten_paths(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dicts of arrays by path."""
    return unflatten_dict(dict(arrays), sep="/")


def flatten_paths(nest: Any) -> dict[str, Any]:
    """The leaves of nested dicts by path; the inverse of `nested`."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(nest)}


def leaf_paths(state: Any) -> list[str]:
    """Path of every leaf, in order."""
    return list(flatten_paths(state))


def check_compatible(wanted: Mapping[str, Any], manifest: Manifest, *, layout: Layout) -> None:
    """Raise UserError where logical names, shapes or dtypes on disk (`manifest`) are not this run's (`wanted`)."""
    theirs = {name: f"{tuple(entry.shape)} {entry.dtype}" for name, entry in manifest.arrays.items()}
    ours = {
        name: f"{tuple(entry.shape)} {entry.dtype}"
        for name, entry in describe(wanted, step=manifest.step, layout=layout, data={}).arrays.items()
    }
    for name in sorted(ours.keys() | theirs.keys()):
        if ours.get(name) != theirs.get(name):
            raise UserError(
                f"checkpoint {manifest.step}: {name} is {theirs.get(name, 'absent')} on disk and "
                f"{ours.get(name, 'absent')} in this run; use another name, or the model and optimizer it had"
            )


def save_error(step: int, directory: Path, error: Exception) -> MeshwrightError:
    """What to raise for a save that did not happen."""
    message = f"checkpoint {step} could not be written to {directory}: {first_line(error)}"
    if "No space left" in str(error) or getattr(error, "errno", None) == errno.ENOSPC:
        return UserError(f"{message}; free some space and run again: earlier checkpoints are whole")
    if "Read-only file system" in str(error) or getattr(error, "errno", None) == errno.EROFS:
        return UserError(f"{message}; make it writable and run again: earlier checkpoints are whole")
    return MeshwrightError(message)
