"""`meshwright launch CONFIG --islands N`: a run of replicas, or of islands, as N jobs on this machine. JAX-free.

runs/NAME/island-0/ ... island-N/    each a run directory of its own
runs/NAME/                           of all of them: config.yaml, metrics, events, summary.json, report.html
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from ...configs.errors import UserError
from ...configs.loader import load_config
from ...configs.run import RunConfig
from ..core.run_directory import open_directory
from ..report.merge_islands import merge_islands
from .local_islands import supervise_islands


def train_islands(
    config: str,
    overrides: Sequence[str],
    *,
    count: int,
    processes: int | None,
    devices: int | None,
    root: Path = Path("runs"),
) -> None:
    """Train `count` islands to their end and merge what they wrote. Raises as `supervise_islands` does.

    `processes` and `devices` (simulated, of each process) are those of one island.
    """
    overrides = [*overrides, *island_overrides(load_config(config, overrides=overrides), count=count)]
    options = [
        *(["--processes", str(processes)] if processes else []),
        *(["--devices-per-process", str(devices)] if devices else []),
    ]
    launch = [sys.executable, "-m", "meshwright.train.cli", "launch", *options, config, *overrides]
    directory = open_directory(load_config(config, overrides=overrides), root=root)
    try:
        supervise_islands(
            lambda number, address: [*launch, f"islands.number={number}", f"islands.meet={address}"],
            count=count,
            directory=directory,
        )
    finally:
        merge_islands(directory)


def island_overrides(config: RunConfig, *, count: int) -> list[str]:
    """The overrides that make `count` islands of the replicas of `config`, each on a replica's share of the devices.

    Raises UserError where `config` has no outer optimizer.
    """
    if config.outer is None:
        raise UserError(f"--islands: {count} islands would never meet; add a section outer, e.g. outer.name=diloco")
    overrides = ["mesh.replica=1", f"islands.count={count}"]
    if config.mesh.replica > 1 and config.mesh.devices is not None:
        overrides.append(f"mesh.devices={config.mesh.devices // config.mesh.replica}")
    return overrides
