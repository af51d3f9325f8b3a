"""`meshwright checkpoint ls | verify | repair`: a run's checkpoints, read on the CPU of this machine."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from ...configs.errors import MeshwrightError, UserError

if TYPE_CHECKING:
    from ...checkpoint.checkpoint_directory import Shelf
    from ...checkpoint.verify import Entry


def shelf_of(run: Path) -> "Shelf":
    """The checkpoints of `run`. Raises UserError where it has none."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # reading must not take a GPU from a run that uses it
    from ...checkpoint.checkpoint_directory import Shelf
    from ..core.run_directory import read_config

    read_config(run)
    shelf = Shelf((run / "checkpoints").absolute())
    if not shelf.present and not shelf.quarantined:
        raise UserError(f"{run}: no checkpoints yet; train it with `meshwright train {run / 'config.yaml'}`")
    return shelf


def rendered(entries: Sequence["Entry"], *, as_json: bool) -> str:
    """A table, or JSON."""
    if as_json:
        return json.dumps([asdict(entry) for entry in entries], indent=1)
    lines = [f"{'step':>8}  {'status':12} {'MB':>9}  {'arrays':>6}  layout"]
    for entry in entries:
        line = f"{entry.step:>8}  {entry.status:12} {entry.bytes / 1e6:>9.2f}  {entry.arrays:>6}  {entry.layout}"
        lines.append(f"{line}  {entry.why}".rstrip())
    return "\n".join(lines)


def ls(run: Path, *, as_json: bool) -> str:
    """What `checkpoint ls` prints."""
    shelf = shelf_of(run)
    from ...checkpoint.verify import list_steps

    return rendered(list_steps(shelf), as_json=as_json)


def verify(run: Path, *, as_json: bool) -> tuple[str, int]:
    """What `checkpoint verify` prints, and its exit code: 0 only where every committed step is whole."""
    shelf = shelf_of(run)
    from ...checkpoint.verify import examine

    found = list(examine(shelf))
    damaged = [entry.step for entry in found if entry.status == "damaged"]
    if damaged:
        verdict = f"damaged: {damaged}; `meshwright checkpoint repair {run}` sets them aside"
    else:
        count = sum(entry.status == "committed" for entry in found)
        verdict = f"whole: all {count} that are committed, every block read and compared with its fingerprint"
    text = rendered(found, as_json=as_json)
    return text if as_json else f"{text}\n{verdict}", MeshwrightError.exit_code if damaged else 0


def repair(run: Path) -> str:
    """What `checkpoint repair` did. Raises MeshwrightError where no whole checkpoint is left."""
    shelf = shelf_of(run)
    from ...checkpoint.verify import repair as repaired

    done = repaired(shelf)
    if not shelf.steps:
        raise MeshwrightError("; ".join([*done, f"no whole checkpoint is left in {shelf.directory}"]))
    return "\n".join(done or [f"nothing to repair: {len(shelf.steps)} checkpoints are whole"])
