"""A streamed source, which is too large or too far away to be read before training: read and cached in windows.

Window n has documents n * size to (n + 1) * size in the order of arrival. It is an entry of the cache, written when it
is first needed and read from there afterwards: a resumed run reads the same windows, and does not rely on the state of
a remote iterator. A window with fewer documents than `size` is the last. The tokenizer to train and the held-out
documents come from window 0.
"""

import json
from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import islice
from pathlib import Path

import numpy as np

from ...configs.errors import MeshwrightError, UserError
from .dataset import ShuffledDataset
from .disk_cache import cache_entry
from .documents import Documents, digest
from .permutation import permutation
from .rows import Row


class DocumentStream:
    """Documents in windows of `size`; every window that was read stays in the cache."""

    def __init__(self, read: Callable[[int], Iterator[str]], *, size: int, fingerprint: str, cache: Path):
        """`read(skip)` iterates over the documents after the first `skip`; it is called again only after a gap."""
        self.size = size
        self.fingerprint = digest("stream", str(size), fingerprint)
        self._read = read
        self._directory = cache / "streams" / self.fingerprint
        self._position, self._iterator = 0, None  # documents taken from the open iterator, and the iterator

    def window(self, number: int) -> Documents:
        """The documents of a window: `size`, fewer in the last window, none after it."""

        def write(directory: Path) -> None:
            text = json.dumps(self._take(number * self.size), ensure_ascii=False)
            (directory / "texts.json").write_text(text, encoding="utf-8")

        def read(directory: Path) -> Documents:
            texts = json.loads((directory / "texts.json").read_text(encoding="utf-8"))
            return Documents(len(texts), texts.__getitem__, digest(self.fingerprint, str(number)))

        return cache_entry(self._directory / f"{number:08}", read=read, write=write)

    def _take(self, start: int) -> list[str]:
        if self._iterator is None or self._position != start:
            self._position, self._iterator = start, self._read(start)
        try:
            documents = list(islice(self._iterator, self.size))
        except OSError as error:  # of the network; an OSError would be reported as an error of the cache
            self._iterator = None
            raise MeshwrightError(
                f"data.path: the stream failed after document {start}: {error}; run again to continue from there"
            ) from error
        self._position += len(documents)
        return documents


class StreamedDataset:
    """Samples of a stream by number: windows in order of arrival, and in a new order in each later epoch.

    Inside a window documents and rows are shuffled as in any data set. To find sample i, a new process opens all
    earlier windows once, for their number of rows.
    """

    def __init__(self, window: Callable[[int], tuple[ShuffledDataset, bool]], *, key: tuple[int, ...]):
        """`window(n)` returns (the samples of window n, whether it is the last)."""
        self._window = lru_cache(maxsize=2)(window)
        self._order = lru_cache(maxsize=2)(self._window_order)
        self._key = key
        self._rows: list[int] = []  # of each window that was opened
        self._total = 0  # their sum
        self._ended = False
        self._open_next()

    def rows_per_epoch(self, epoch: int = 0) -> int:
        """Rows of the windows that were read so far: of all windows once the stream has ended."""
        del epoch
        return self._total

    def row(self, index: int) -> Row:
        while not self._ended and index >= self._total:
            self._open_next()
        if not self._total:
            raise UserError(f"data.path: the stream has no training text in {len(self._rows)} windows; use another")
        epoch, position = divmod(index, self._total) if self._ended else (0, index)
        windows, stops = self._order(epoch, len(self._rows))
        nth = int(np.searchsorted(stops, position, side="right"))
        shuffled, _ = self._window(int(windows[nth]))
        rows = shuffled.rows_per_epoch()
        return shuffled.row(epoch * rows + position - (int(stops[nth]) - rows))

    def _open_next(self) -> None:
        shuffled, self._ended = self._window(len(self._rows))
        self._rows.append(shuffled.rows_per_epoch())
        self._total += self._rows[-1]

    def _window_order(self, epoch: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """(order [windows] of the first `count` windows in an epoch, the row at which each of them stops)."""
        windows = permutation(count, *self._key, epoch) if epoch else np.arange(count)
        return windows, np.cumsum(np.array(self._rows)[windows])
