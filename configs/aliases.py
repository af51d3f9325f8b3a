"""Keys of other tools -> ours, so that a habit from elsewhere gets an answer. `aliases.yaml` is the table, by tool."""

from functools import cache
from pathlib import Path

import yaml


@cache
def foreign_keys() -> dict[str, str]:
    """Another tool's key -> ours, e.g. `lora_r` -> `adapter.rank`."""
    tools = yaml.safe_load((Path(__file__).parent / "aliases.yaml").read_text(encoding="utf-8"))
    return {theirs: ours for keys in tools.values() for theirs, ours in keys.items()}
