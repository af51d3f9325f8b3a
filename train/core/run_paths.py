"""Where a run writes: runs/NAME, and for each of its islands runs/NAME/island-3. JAX-free."""

from pathlib import Path

from ...configs.errors import UserError
from ...configs.run import RunConfig


def place(config: RunConfig, root: Path) -> tuple[Path, str]:
    """(parent, name) of a run's directory: root/NAME, or root/NAME/island-3. Raises UserError for an island of none."""
    if config.islands is None:
        return root, config.name
    if config.islands.number is None or config.islands.meet is None:
        raise UserError(
            f"islands.number: {config.islands.number}, islands.meet: {config.islands.meet}: start all islands here "
            "with `meshwright launch CONFIG --islands N`, or this one with islands.number=K islands.meet=HOST:PORT"
        )
    return root / config.name, f"island-{config.islands.number}"


def run_directory(config: RunConfig, *, root: Path) -> Path:
    """The directory itself. Raises as `place`."""
    parent, name = place(config, root)
    return parent / name


def newest(run: Path) -> Path:
    """`run`, or where it is a run of islands, the island whose checkpoint is the newest."""
    steps = {
        island: max((int(step.name) for step in (island / "checkpoints").iterdir() if step.name.isdigit()), default=-1)
        for island in sorted(run.glob("island-*"))
        if (island / "checkpoints").is_dir()
    }
    if (run / "checkpoints").is_dir() or not steps:
        return run
    return max(steps, key=lambda island: steps[island])
