"""Keys of other tools -> ours, so that a habit from elsewhere gets an answer. `aliases.yaml` is the table, by tool."""

from functools import cache
from pathlib import Path

import yaml


def find_alias(key: str) -> str | None:
    """Our key for `key` of another tool, e.g. `lora_r` -> `adapter.rank`; None where it is no such key."""
    return key_aliases().get(key)


@cache
def key_aliases() -> dict[str, str]:
    """Another tool's key -> ours, e.g. `lora_r` -> `adapter.rank`."""
    tools = yaml.safe_load((Path(__file__).parent / "aliases.yaml").read_text(encoding="utf-8"))
    return {theirs: ours for keys in tools.values() for theirs, ours in keys.items()}
