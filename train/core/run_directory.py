"""The run directory `runs/NAME/`: opened once, refused where it belongs to another configuration.

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
from ...configs.loader import dump, parse, validated
from ...configs.run import RunConfig

# What may change between two sittings of one run: none of it changes what is computed, but how long the run is.
MAY_CHANGE = (
    "steps",
    "microbatches",
    "mesh",
    "pipeline",
    "sequence",
    "memory",
    "evaluation",
    "checkpoint",
    "elastic",
    "islands",
    "launch",
    "logging",
)
MAY_CHANGE_KEYS = ("data.cache", "data.prefetch")
MAY_NOT_CHANGE_KEYS = ("mesh.replica", "islands.count")  # replicas train by themselves: another number, another run


def open_directory(config: RunConfig, *, root: Path, name: str | None = None, write: bool = True) -> Path:
    """`root`/NAME (default the run's) with this run's config.yaml in it.

    `write` false: only look (processes other than the first).

    Raises UserError where the directory holds a run of another configuration, naming the keys that differ.
    """
    directory = root / (name or config.name)
    file = directory / "config.yaml"
    # Islands of the same name may have been here by themselves: they are runs of their own.
    if directory.exists() and any(not item.name.startswith("island-") for item in directory.iterdir()):
        if not file.exists():  # in this order: a run's directory comes with its config.yaml
            raise UserError(f"name: {directory} exists and is not a run (no config.yaml); choose another name")
        check_same(read_config(directory), config, directory=directory)
    if write:
        try:
            write_config(file, dump(config))
        except OSError as error:
            raise UserError(f"name: {directory} cannot be written: {error.strerror}") from error
    return directory


def write_config(file: Path, text: str) -> None:
    """Write `file`, and its directory with it: other processes never see the one without the other."""
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
    """The configuration of the run in `directory`. Raises UserError where there is none."""
    file = directory / "config.yaml"
    if not file.is_file():
        raise UserError(f"{directory}: not a run directory (no config.yaml); {runs_beside(directory)}")
    return validated(parse(file.read_text(encoding="utf-8"), origin=str(file)))


def runs_beside(directory: Path) -> str:
    """What to name instead of `directory`: the runs there are in it (islands), where it would be, or in `runs/`."""
    for root in dict.fromkeys((directory, directory.parent, Path("runs"))):
        if found := sorted(str(file.parent) for file in root.glob("*/config.yaml")):
            near = difflib.get_close_matches(directory.name, [Path(run).name for run in found], n=1)
            return f"there are {', '.join(found)}" if not near else f"did you mean {root / near[0]}?"
    return f"`meshwright train` makes one ({Path.cwd()} has no runs)"


def check_same(old: RunConfig, new: RunConfig, *, directory: Path) -> None:
    """Raise UserError listing the keys in which `new` is another run than `old`."""
    before, after = dict(flat(old.model_dump(mode="json"))), dict(flat(new.model_dump(mode="json")))
    # The noise of a private run was chosen for its steps: with more of them, more would be told than was allowed.
    fixed = {"steps"} if new.privacy is not None and new.privacy.epsilon is not None else set()
    changed = [
        f"{key} ({before.get(key)} there, {after.get(key)} here)"
        for key in sorted(before.keys() | after.keys())
        if (key in fixed or not may_change(key)) and before.get(key) != after.get(key)
    ]
    if changed:
        raise UserError(
            f"name: {directory} holds a run with another {', '.join(changed[:4])}"
            f"{f' and {len(changed) - 4} more' if len(changed) > 4 else ''}; choose another name, or remove it"
        )


def may_change(key: str) -> bool:
    """Whether the setting changes nothing of what is computed."""
    if key in MAY_NOT_CHANGE_KEYS:
        return False
    return key.split(".")[0] in MAY_CHANGE or key in MAY_CHANGE_KEYS


def flat(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every leaf."""
    if isinstance(tree, Mapping) and tree:
        for key, value in tree.items():
            yield from flat(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, tree


def write_text(file: Path, text: str) -> None:
    """Replace `file` whole or not at all."""
    draft = file.with_name(f".{file.name}.{os.getpid()}")
    draft.write_text(text, encoding="utf-8")
    os.replace(draft, file)


def write_json(file: Path, value: Any) -> None:
    """`write_text` of readable JSON."""
    write_text(file, json.dumps(value, indent=1) + "\n")
