"""Slots taken out of a running job by hand: hosts that go for repair, and come back. JAX-free.

    $ meshwright drain runs/NAME 2            save, stop, and go on without slot 2
    $ meshwright drain runs/NAME 2 --undo     it may be used again

The list is the file `drained` of the run directory, which the launcher reads.
"""

import json
from collections.abc import Collection
from pathlib import Path

from ...configs.errors import UserError
from ..core.run_directory import write_text

FILE = "drained"


def read_drained(directory: Path) -> frozenset[int]:
    """The slots that are taken out of the run in `directory`."""
    try:
        return frozenset(json.loads((directory / FILE).read_text()))
    except FileNotFoundError:
        return frozenset()


def drain(directory: Path, slots: Collection[int], *, undo: bool = False) -> frozenset[int]:
    """Take `slots` out, or with `undo` put them back. Returns the slots that are out now.

    Raises UserError where `directory` is no run directory.
    """
    if not (directory / "config.yaml").is_file():
        raise UserError(f"{directory}: not a run directory (no config.yaml)")
    before = read_drained(directory)
    after = before - set(slots) if undo else before | set(slots)
    write_text(directory / FILE, json.dumps(sorted(after)))
    return after
