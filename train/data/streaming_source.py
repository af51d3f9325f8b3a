"""A source too large, or too far away, to be read before training starts: read window by window, and kept.

Window n holds documents n * size to (n + 1) * size in the order they arrive. It is an entry of the cache, made when it
is first needed and read from there ever after: to resume is to look up the same windows again, and nothing rests on
what a remote iterator remembers of itself. A window with fewer documents than `size` is the last. What must be known
before the first step (a tokenizer to train, the documents to evaluate on) comes from window 0.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path

import numpy as np

from ...configs.errors import MeshwrightError, UserError
from .dataset import ShuffledDataset
from .disk_cache import cache_entry
from .documents import digest
from .permutation import permutation
from .rows import Row


@dataclass(frozen=True)
class InMemoryDocuments:
    """Documents in memory."""

    texts: tuple[str, ...]
    fingerprint: str

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int) -> str:
        return self.texts[index]


class DocumentStream:
    """Documents in windows of `size`, of which every one that was read stays in `directory`."""

    def __init__(self, read: Callable[[int], Iterator[str]], *, size: int, fingerprint: str, cache: Path):
        """`read(skip)` iterates over the documents behind the first `skip`; it is called again after a gap only."""
        self.size = size
        self.fingerprint = digest("stream", str(size), fingerprint)
        self._read = read
        self._directory = cache / "streams" / self.fingerprint
        self._position, self._rest = 0, None  # how many documents were taken from the open iterator, and the iterator

    def window(self, number: int) -> InMemoryDocuments:
        """The documents of a window: at most `size`, fewer in the last, none behind it."""

        def write(directory: Path) -> None:
            text = json.dumps(self._take(number * self.size), ensure_ascii=False)
            (directory / "texts.json").write_text(text, encoding="utf-8")

        def read(directory: Path) -> InMemoryDocuments:
            texts = json.loads((directory / "texts.json").read_text(encoding="utf-8"))
            return InMemoryDocuments(tuple(texts), digest(self.fingerprint, str(number)))

        return cache_entry(self._directory / f"{number:08}", read=read, write=write)

    def _take(self, start: int) -> list[str]:
        if self._rest is None or self._position != start:
            self._position, self._rest = start, self._read(start)
        try:
            taken = list(islice(self._rest, self.size))
        except OSError as error:  # the network; as an OSError it would pass for trouble with the cache
            self._rest = None
            raise MeshwrightError(
                f"data.path: the stream broke behind document {start}: {error}; run again to go on from there"
            ) from error
        self._position += len(taken)
        return taken


class StreamedDataset:
    """Samples of a stream by number: its windows in order of arrival, and from the second epoch on in a new order each.

    Inside a window documents and rows are shuffled as in any data set. To find sample i in a new process, the windows
    before it are opened once, for their number of rows.
    """

    def __init__(self, window: Callable[[int], tuple[ShuffledDataset, bool]], *, key: tuple[int, ...]):
        """`window(n)` gives the samples of window n, and whether it is the last."""
        self._window = lru_cache(maxsize=2)(window)
        self._order = lru_cache(maxsize=2)(self._permuted)
        self._key = key
        self._rows: list[int] = []  # of each window that was opened
        self._total = 0  # their sum
        self._ended = False
        self._open_next()

    def rows_per_epoch(self, epoch: int = 0) -> int:
        """Rows that were read so far: of all windows once the stream has ended."""
        del epoch
        return self._total

    def row(self, index: int) -> Row:
        while not self._ended and index >= self._total:
            self._open_next()
        if not self._total:
            raise UserError(f"data.path: the stream ended after {len(self._rows)} windows without text to train on")
        epoch, place = divmod(index, self._total) if self._ended else (0, index)
        windows, stops = self._order(epoch, len(self._rows))
        nth = int(np.searchsorted(stops, place, side="right"))
        shuffled, _ = self._window(int(windows[nth]))
        rows = shuffled.rows_per_epoch()
        return shuffled.row(epoch * rows + place - (int(stops[nth]) - rows))

    def _open_next(self) -> None:
        shuffled, self._ended = self._window(len(self._rows))
        self._rows.append(shuffled.rows_per_epoch())
        self._total += self._rows[-1]

    def _permuted(self, epoch: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """[windows] the order of the first `count` windows in an epoch, and where each stops in rows."""
        windows = permutation(count, *self._key, epoch) if epoch else np.arange(count)
        return windows, np.cumsum(np.array(self._rows)[windows])
