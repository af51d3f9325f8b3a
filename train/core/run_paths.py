"""Directories of runs: runs/NAME, and for each island of a run runs/NAME/island-3. JAX-free."""

from pathlib import Path

from ...configs.errors import UserError
from ...configs.run import RunConfig


def parent_and_name(config: RunConfig, root: Path) -> tuple[Path, str]:
    """Return (parent, name) of the directory of a run: root/NAME, or root/NAME/island-3.

    Raises UserError if the run has islands and this process is not told which one it is.
    """
    if config.islands is None:
        return root, config.name
    if config.islands.number is None or config.islands.meet is None:
        raise UserError(
            f"islands.number: {config.islands.number}, islands.meet: {config.islands.meet}: start all islands here "
            "with `meshwright launch CONFIG --islands N`, or this one with islands.number=K islands.meet=HOST:PORT"
        )
    return root / config.name, f"island-{config.islands.number}"


def directory_of_run(config: RunConfig, *, root: Path) -> Path:
    """Return the directory of a run. Raises like `parent_and_name`."""
    parent, name = parent_and_name(config, root)
    return parent / name


def newest_island(run: Path) -> Path:
    """Return `run`, or if it is a run of islands, the directory of the island with the newest checkpoint."""
    steps = {
        island: max((int(step.name) for step in (island / "checkpoints").iterdir() if step.name.isdigit()), default=-1)
        for island in sorted(run.glob("island-*"))
        if (island / "checkpoints").is_dir()
    }
    if (run / "checkpoints").is_dir() or not steps:
        return run
    return max(steps, key=lambda island: steps[island])
