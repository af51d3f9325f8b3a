"""Whole states on the run's storage: asynchronous saves by Orbax, and the way back onto any mesh.

A checkpoint holds the state by path (params/..., opt_state/..., step, rng) in arrays that no mesh shape changes, and a
few integers of the data's. It appears under its final name only when it is whole; a save that fails raises at the next
call, so that no run ends well without its state.
"""

import errno
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from ..configs.errors import MeshwrightError, UserError, first_line
from ..parallel.rules import path_name
from ..parallel.state import TrainState

SAVED = ("step", "params", "opt_state", "outer", "rng")  # `frozen` never changes


class Storage:
    """Checkpoints of one run under `directory`, the newest `keep` of them."""

    def __init__(self, directory: Path, *, keep: int):
        logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax narrates every save
        self._checkpointer = ocp.training.Checkpointer(
            directory.absolute(),
            preservation_policy=ocp.training.preservation_policies.LatestN(keep),
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
            cleanup_tmp_directories=True,
        )
        self._directory = directory
        self._pending: tuple[int, Any] | None = None

    @property
    def steps(self) -> list[int]:
        """Steps of whole checkpoints, oldest first."""
        return sorted(checkpoint.step for checkpoint in self._checkpointer.checkpoints)

    def save(self, state: TrainState, *, step: int, data: Mapping[str, Any]) -> None:
        """Begin to save `state` after `step` updates; returns when the arrays may change. `data` is JSON.

        Waits for the save before it. Raises MeshwrightError where that one failed.
        """
        self.wait()
        if step in self.steps:
            return
        try:
            response = self._checkpointer.save_async(step, tree(state), custom_metadata=dict(data))
        except Exception as error:
            raise failed(step, self._directory, error) from error
        self._pending = (step, response)

    def committed(self) -> int | None:
        """The step whose save has just become whole; each is returned once. None: nothing new."""
        if self._pending is None or self._checkpointer.is_saving_in_progress():
            return None
        return self.wait()

    def wait(self) -> int | None:
        """Wait for the save under way; its step, or None. Raises MeshwrightError where it failed."""
        if self._pending is None:
            return None
        (step, response), self._pending = self._pending, None
        try:
            response.result()
        except Exception as error:
            raise failed(step, self._directory, error) from error
        return step

    def restore(self, step: int, *, shapes: TrainState, shardings: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """The state saved at `step`, placed by `shardings`, and the data's integers. `shapes` is what the run expects.

        Raises UserError where the checkpoint holds another model's arrays, MeshwrightError where it cannot be read.
        """
        wanted = tree(shapes)
        where = jax.tree.leaves(tree(shardings))
        abstract = jax.tree.unflatten(
            jax.tree.structure(wanted),
            [
                jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
                for leaf, sharding in zip(jax.tree.leaves(wanted), where, strict=True)
            ],
        )
        metadata = self._checkpointer.metadata(step)
        try:
            check_same(abstract, metadata.metadata, step=step)
            loaded = self._checkpointer.load(step, abstract)
        except UserError:
            raise
        except Exception as error:
            raise MeshwrightError(
                f"checkpoint {step} in {self._directory} cannot be read: {first_line(error)}"
            ) from error
        leaves = dict(zip(names(wanted), jax.tree.leaves(loaded), strict=True))
        kept = [leaves.get(name) for name in names(shapes)]
        return jax.tree.unflatten(jax.tree.structure(shapes), kept), dict(metadata.custom_metadata or {})

    def data(self, step: int) -> dict[str, Any]:
        """What was saved beside the arrays of `step`. Raises MeshwrightError where it cannot be read."""
        try:
            return dict(self._checkpointer.metadata(step).custom_metadata or {})
        except Exception as error:
            raise MeshwrightError(
                f"checkpoint {step} in {self._directory} cannot be read: {first_line(error)}"
            ) from error

    def close(self) -> None:
        """Wait for what is under way, and let go."""
        self.wait()
        self._checkpointer.close()


def tree(state: TrainState) -> dict[str, Any]:
    """The saved part as nested dicts by path: what is on disk does not depend on any library's state classes."""
    result: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        *parents, last = path_name(path).split("/")
        if (parents or [last])[0] not in SAVED:
            continue
        place = result
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = leaf
    return result


def names(state: Any) -> list[str]:
    """Path of every leaf, in order."""
    return [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(state)]


def check_same(wanted: Any, found: Any, *, step: int) -> None:
    """Raise UserError where names or shapes on disk (`found`) are not this run's (`wanted`)."""
    ours = {path_name(path): tuple(leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(wanted)}
    theirs = {path_name(path): tuple(leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(found)}
    if not theirs:
        raise FileNotFoundError("it lists no arrays")
    for name in sorted(ours.keys() | theirs.keys()):
        if ours.get(name) != theirs.get(name):
            raise UserError(
                f"checkpoint {step}: {name} is {theirs.get(name, 'absent')} on disk and {ours.get(name, 'absent')} in "
                "this run; use another name, or the model and optimizer it was saved with"
            )


def failed(step: int, directory: Path, error: Exception) -> MeshwrightError:
    """What to raise for a save that did not happen."""
    message = f"checkpoint {step} could not be written to {directory}: {first_line(error)}"
    if "No space left" in str(error) or getattr(error, "errno", None) == errno.ENOSPC:
        return UserError(f"{message}; free some space and run again: earlier checkpoints are whole")
    return MeshwrightError(message)
