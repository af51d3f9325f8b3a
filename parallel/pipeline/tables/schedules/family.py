"""The interface of a schedule: a function from a request to a table, and the options that it takes. NumPy only."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..table import Table


@dataclass(frozen=True)
class Request:
    """The sizes and options of a table."""

    devices: int
    microbatches: int
    chunks: int  # stages on each device
    vocabulary: int = 0  # algorithm of the vocabulary passes, 1 or 2; 0: none
    memory_limit: float | None = None  # microbatches of all its chunks that a device may hold; None: no limit
    placement: np.ndarray | None = None  # [devices, chunks], only for `forward-only`
    path: Path | None = None  # of a CSV, only for `file`


@dataclass(frozen=True)
class Family:
    """A schedule of any size."""

    make: Callable[[Request], Table]
    about: str  # one line for lists
    chunks: tuple[int, int | None] = (1, 1)  # fewest (the default) and most chunks; None: any number
    vocabulary: tuple[int, ...] = (0,)  # algorithms of vocabulary passes that it takes
    options: tuple[str, ...] = ()  # those it takes of memory_limit, placement, path
    trains: bool = True  # False: forward passes only
