"""Numbers that papers printed, to compare the simulator with. `published.yaml` has them, with their sources."""

from pathlib import Path
from typing import NamedTuple

import yaml


class Setup(NamedTuple):
    """A model on a pipeline."""

    schedule: str
    gpus: int
    layers: int
    embed: int
    sequence: int


class Published(NamedTuple):
    """A row of the paper's table, by vocabulary."""

    mfu: tuple[float, ...]
    gigabytes: tuple[float, ...]


_TABLES = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
VOCABULARIES: list[int] = _TABLES["vocabularies"]
MICROBATCHES: int = _TABLES["microbatches"]
VOCABULARY = {
    Setup(**row["setup"]): {method: Published(**numbers) for method, numbers in row["methods"].items()}
    for row in _TABLES["vocabulary"]
}
BUBBLES: dict[str, float] = _TABLES["bubbles"]
BUBBLES_AT: dict[str, int] = _TABLES["bubbles_at"]
