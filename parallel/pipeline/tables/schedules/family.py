"""What a family of schedules is: a function from a request to a table, and what it can be asked for. NumPy only."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..table import Table


@dataclass(frozen=True)
class Request:
    """What the table is for."""

    devices: int
    microbatches: int
    chunks: int  # stages a device holds
    vocabulary: int = 0  # 0 none; 1 or 2: the algorithm of the vocabulary passes
    memory_limit: float | None = (
        None  # activations a device may hold, in microbatches of all its chunks; None: no limit
    )
    placement: np.ndarray | None = None  # only for a table that follows another's placement
    path: Path | None = None  # only for a table that is read


@dataclass(frozen=True)
class Family:
    """A named way to make tables."""

    make: Callable[[Request], Table]
    about: str  # one line for lists
    chunks: tuple[int, int | None] = (1, 1)  # fewest (and default) and most; None: any number
    vocabulary: tuple[int, ...] = (0,)  # algorithms it takes
    options: tuple[str, ...] = ()  # of memory_limit, placement, path
    trains: bool = True  # False: forward passes only
