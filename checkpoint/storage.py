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
from .checkpoint_directory import Shelf
from .integrity import described, describing, verify
from .layout_conversion import Layout, converted
from .manifest import DamagedCheckpoint, Manifest
from .storage_timeout import WRITER, StorageHangs

PATIENCE = 300.0  # seconds for the other processes to finish hashing
TIMEOUT = 600.0  # seconds for a save
SAVED = ("step", "params", "opt_state", "outer", "rng")  # `frozen` never changes


@dataclass(frozen=True)
class Spent:
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
        self, directory: Path, *, layout: Layout, allowed: Callable[[], None] = lambda: None, timeout: float = TIMEOUT
    ):
        for narrator in ("absl", "asyncio"):  # Orbax narrates every save, and every array of a failed read
            logging.getLogger(narrator).setLevel(logging.CRITICAL)
        self.shelf = Shelf(directory.absolute())
        self._layout = layout
        self._allowed, self._timeout = allowed, timeout
        self._pending: tuple[int, Future] | None = None
        self._began = 0.0  # when the save under way did
        self._saved: set[int] = set()  # in this sitting
        self._waiter = ThreadPoolExecutor(1, WRITER)
        self.spent = Spent()  # on the last save, beside training

    @property
    def steps(self) -> list[int]:
        """Committed steps, oldest first."""
        return self.shelf.steps

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
        begin = partial(self._begun, tree(state), step, data)
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
            self.shelf.begin(step, processes=jax.process_count())
        describe = describing(by_path(saved), step=step, layout=self._layout, data=data)
        copied = time.monotonic() - began
        response = ocp.save_async(self.shelf.path(step), saved)
        size = sum(shard.data.nbytes for leaf in by_path(saved).values() for shard in leaf.addressable_shards)

        def ended() -> None:
            hashing = time.monotonic()
            try:
                part = describe()
                hashed = time.monotonic() - hashing
                self.shelf.put_part(part, process=jax.process_index())
            finally:
                response.result()  # whatever has failed, nobody writes any more when it is cleared away
            self._allowed()
            if jax.process_index() == 0:
                self.shelf.commit(step, patience=PATIENCE)
            self.spent = Spent(copied, hashed, time.monotonic() - began, size)

        return ended

    @property
    def pending(self) -> int | None:
        """The step whose save is under way."""
        return None if self._pending is None else self._pending[0]

    @property
    def ended(self) -> bool:
        """Whether the save under way has ended, well or not: `wait` will not."""
        return self._pending is not None and self._pending[1].done()

    @property
    def busy(self) -> bool:
        """Whether a save is under way."""
        return self._pending is not None and not self.ended

    @property
    def hangs(self) -> bool:
        """Whether the save under way should have ended."""
        return self.busy and time.monotonic() > self._began + self._timeout

    def under_way(self, seconds: float) -> bool:
        """Whether a save will still be under way in so many seconds, and in time; waits to see."""
        if not self.busy or self.hangs:
            return False
        futures.wait([self._pending[1]], min(seconds, self._began + self._timeout - time.monotonic()))
        return self.busy and not self.hangs

    def wait(self) -> int | None:
        """Wait for the save under way; its step, or None. Raises MeshwrightError where it failed.

        Raises StorageHangs where it has not ended in time. It stays under way: where the storage answers again after
        all, it ends as any other.
        """
        if self._pending is None:
            return None
        step, future = self._pending
        while self.under_way(self._timeout):
            pass
        if not future.done():
            raise StorageHangs(
                f"checkpoint {step} has not been written to {self.shelf.directory} within {self._timeout:g} s "
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
        manifest = manifests.read(self.shelf.path(step))
        wanted = by_path(tree(shapes))
        placed = by_path(tree(shardings))
        check_same(wanted, manifest, layout=self._layout)
        alike = {path: [list(leaf.shape), str(leaf.dtype)] for path, leaf in wanted.items()} == manifest.stored
        direct = alike and manifest.layout == self._layout.name
        mesh = next(iter(placed.values())).mesh
        loaded = load(self.shelf, manifest, placed if direct else spread(manifest, mesh))
        verify(loaded, manifest, where=self.shelf.path(step))
        if not direct:
            convert = jax.jit(
                lambda stored: converted(stored, manifest, shapes=wanted, layout=self._layout), out_shardings=placed
            )
            loaded = convert(loaded)
        leaves = [loaded.get(name) for name in names(shapes)]
        return jax.tree.unflatten(jax.tree.structure(shapes), leaves), manifest.data

    def keep_only(self, steps: Collection[int]) -> None:
        """Delete the committed checkpoints of other steps."""
        self._allowed()
        for step in set(self.steps) - set(steps):
            self.shelf.remove(step)

    def close(self) -> None:
        """Wait for what is under way, and let go; of a thread that hangs, too (`hanging.py`)."""
        try:
            self.wait()
        finally:
            self._waiter.shutdown(wait=not self.busy)

    def _failed(self, step: int, error: Exception) -> MeshwrightError:
        """What to raise for a save that did not happen; what it left is deleted, so that its space is free again."""
        self._saved.discard(step)
        with suppress(MeshwrightError):  # one of an older membership: what is unfinished there is another's
            self._allowed()
            if jax.process_index() == 0:
                self.shelf.abandon(step)
        return failed(step, self.shelf.directory, error)


def load(shelf: Shelf, manifest: Manifest, shardings: Mapping[str, Any]) -> dict[str, jax.Array]:
    """The arrays of a checkpoint by path, as stored, unverified. Raises DamagedCheckpoint where one is missing."""
    abstract = nested(
        {
            path: jax.ShapeDtypeStruct(tuple(shape), jnp.dtype(dtype), sharding=shardings[path])
            for path, (shape, dtype) in manifest.stored.items()
        }
    )
    with quiet():
        try:
            return by_path(ocp.load(shelf.path(manifest.step), abstract))
        except MemoryError:
            raise
        except Exception as error:
            if "RESOURCE_EXHAUSTED" in str(error):  # this machine's memory, not the checkpoint's fault
                raise
            why = first_line(error)
        gc.collect(1)
    raise DamagedCheckpoint(f"checkpoint {manifest.step} in {shelf.directory} cannot be read: {why}")


@contextmanager
def quiet() -> Iterator[None]:
    """A failed read leaves other reads behind that nobody waits for: collect them here, unheard."""
    before = sys.unraisablehook
    sys.unraisablehook = lambda _: None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            yield
    finally:
        sys.unraisablehook = before


def spread(manifest: Manifest, mesh: jax.sharding.Mesh) -> dict[str, NamedSharding]:
    """A sharding for every stored array, whatever its layout: its longest divisible dimension over all devices."""
    result = {}
    for path, (shape, _) in manifest.stored.items():
        dividable = [dimension for dimension, size in enumerate(shape) if size % mesh.size == 0]
        longest = max(dividable, key=lambda dimension: shape[dimension], default=None)
        spec = [mesh.axis_names if dimension == longest else None for dimension in range(len(shape))]
        result[path] = NamedSharding(mesh, PartitionSpec(*spec))
    return result


def tree(state: TrainState) -> dict[str, Any]:
    """The saved part as nested dicts by path: what is on disk does not depend on any library's state classes."""
    saved = {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state)}
    return nested({path: leaf for path, leaf in saved.items() if path.split("/")[0] in SAVED})


def nested(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dicts of arrays by path."""
    return unflatten_dict(dict(arrays), sep="/")


def by_path(nest: Any) -> dict[str, Any]:
    """The leaves of nested dicts by path; the inverse of `nested`."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(nest)}


def names(state: Any) -> list[str]:
    """Path of every leaf, in order."""
    return list(by_path(state))


def check_same(wanted: Mapping[str, Any], manifest: Manifest, *, layout: Layout) -> None:
    """Raise UserError where logical names, shapes or dtypes on disk (`manifest`) are not this run's (`wanted`)."""
    theirs = {name: f"{tuple(entry.shape)} {entry.dtype}" for name, entry in manifest.arrays.items()}
    ours = {
        name: f"{tuple(entry.shape)} {entry.dtype}"
        for name, entry in described(wanted, step=manifest.step, layout=layout, data={}).arrays.items()
    }
    for name in sorted(ours.keys() | theirs.keys()):
        if ours.get(name) != theirs.get(name):
            raise UserError(
                f"checkpoint {manifest.step}: {name} is {theirs.get(name, 'absent')} on disk and "
                f"{ours.get(name, 'absent')} in this run; use another name, or the model and optimizer it had"
            )


def failed(step: int, directory: Path, error: Exception) -> MeshwrightError:
    """What to raise for a save that did not happen."""
    message = f"checkpoint {step} could not be written to {directory}: {first_line(error)}"
    if "No space left" in str(error) or getattr(error, "errno", None) == errno.ENOSPC:
        return UserError(f"{message}; free some space and run again: earlier checkpoints are whole")
    if "Read-only file system" in str(error) or getattr(error, "errno", None) == errno.EROFS:
        return UserError(f"{message}; make it writable and run again: earlier checkpoints are whole")
    return MeshwrightError(message)
