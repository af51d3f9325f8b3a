"""The run directory `runs/NAME/`. A directory that belongs to another configuration is refused.

config.yaml  environment.json  plan.json  metrics.jsonl  events.jsonl  tensorboard/  checkpoints/  report.html
"""

import difflib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ...configs.errors import UserError
from ...configs.loader import dump_yaml, parse_yaml, validate_tree
from ...configs.run import RunConfig

# Sections that may change between two sessions of a run: none changes what is computed, except the length of the run.
MAY_CHANGE = (
    "steps", "microbatches", "mesh", "pipeline", "sequence", "memory", "evaluation", "checkpoint", "elastic", "islands",
    "launch", "logging",
)  # fmt: skip
MAY_CHANGE_KEYS = ("data.cache", "data.prefetch")
MAY_NOT_CHANGE_KEYS = ("mesh.replica", "islands.count")  # the number of replicas changes what is computed


def open_directory(config: RunConfig, *, root: Path, name: str | None = None, write: bool = True) -> Path:
    """Return `root`/NAME (default: `config.name`), with the config.yaml of this run in it.

    With `write` false the directory is only checked (processes other than the first). Raises UserError if it holds a
    run of another configuration, and names the keys that differ.
    """
    directory = root / (name or config.name)
    file = directory / "config.yaml"
    # Folders of islands do not make it a run: each island is a run of its own.
    if directory.exists() and any(not item.name.startswith("island-") for item in directory.iterdir()):
        if not file.exists():  # asked second, because a run directory appears together with its config.yaml
            raise UserError(
                f"name: {directory} exists and is not a run directory (no config.yaml); choose another name"
            )
        check_same_run(read_config(directory), config, directory=directory)
    if write:
        try:
            write_config(file, dump_yaml(config))
        except OSError as error:
            raise UserError(
                f"name: {directory} cannot be written: {error.strerror}; make it writable, or choose another name"
            ) from error
    return directory


def write_config(file: Path, text: str) -> None:
    """Write `file` and create its directory in one step: other processes never see an empty directory."""
    if file.parent.is_dir() and any(file.parent.iterdir()):
        write_text(file, text)
        return
    draft = file.parent.with_name(f".{file.parent.name}.{os.getpid()}")
    draft.mkdir(parents=True, exist_ok=True)
    try:
        (draft / file.name).write_text(text, encoding="utf-8")
        os.rename(draft, file.parent)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def read_config(directory: Path) -> RunConfig:
    """Return the configuration of the run in `directory`. Raises UserError if there is none."""
    file = directory / "config.yaml"
    if not file.is_file():
        raise UserError(f"{directory} is not a run directory (it has no config.yaml); {suggest_runs(directory)}")
    return validate_tree(parse_yaml(file.read_text(encoding="utf-8"), origin=str(file)))


def suggest_runs(directory: Path) -> str:
    """Suggest runs to name instead of `directory`: those in it (islands), beside it, or in `runs/`."""
    for root in dict.fromkeys((directory, directory.parent, Path("runs"))):
        if runs := sorted(str(file.parent) for file in root.glob("*/config.yaml")):
            matches = difflib.get_close_matches(directory.name, [Path(run).name for run in runs], n=1)
            return f"there are {', '.join(runs)}" if not matches else f"did you mean {root / matches[0]}?"
    return f"`meshwright train` makes one ({Path.cwd()} has no runs)"


def check_same_run(previous: RunConfig, current: RunConfig, *, directory: Path) -> None:
    """Raise UserError, naming the keys, if `current` would continue the run of `previous` with other settings."""
    before, after = (
        dict(flatten_keys(previous.model_dump(mode="json"))),
        dict(flatten_keys(current.model_dump(mode="json"))),
    )
    # The noise of a private run was calibrated for its number of steps: more steps would exceed its epsilon.
    fixed = {"steps"} if current.privacy is not None and current.privacy.epsilon is not None else set()
    changed = [
        f"{key}={before.get(key)} (now {after.get(key)})"
        for key in sorted(before.keys() | after.keys())
        if (key in fixed or not may_change(key)) and before.get(key) != after.get(key)
    ]
    if changed:
        raise UserError(
            f"name: {directory} holds a run that was started with {', '.join(changed[:4])}"
            f"{f' and {len(changed) - 4} other differences' if len(changed) > 4 else ''}; "
            "set them back, choose another name, or remove the directory"
        )


def may_change(key: str) -> bool:
    """Whether a setting may change between two sessions of a run."""
    if key in MAY_NOT_CHANGE_KEYS:
        return False
    return key.split(".")[0] in MAY_CHANGE or key in MAY_CHANGE_KEYS


def flatten_keys(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) of every leaf of nested mappings."""
    if isinstance(tree, Mapping) and tree:
        for key, value in tree.items():
            yield from flatten_keys(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, tree


def write_text(file: Path, text: str) -> None:
    """Replace `file` atomically."""
    draft = file.with_name(f".{file.name}.{os.getpid()}")
    draft.write_text(text, encoding="utf-8")
    os.replace(draft, file)


def write_json(file: Path, value: Any) -> None:
    """Replace `file` atomically by `value` as indented JSON."""
    write_text(file, json.dumps(value, indent=1) + "\n")
