"""What the model will be asked to predict, as coloured text: the quickest way to see that the data are what one thinks.

    row 0: 2 documents, 250 tokens to predict, 6 of padding
    ▌1 import os<|endoftext|>▌2 class Queue: ...

Green tokens count fully, yellow ones partly, dim ones not at all; `▌n` begins document n of the row. The two
answers of a pair are two documents, 1 and 2, 3 and 4, ...: the better one first.
"""

from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from .assemble import Data
from .fixed_mixture import FixedTrainingMixture
from .rows import Row
from .tokenizer import Tokenizer

if TYPE_CHECKING:
    from rich.text import Text

FULL, PARTLY, NOT_AT_ALL, MARK = "green", "yellow", "dim", "bold cyan"


def render(data: Data, rows: int = 2) -> "Text":
    """The first `rows` training rows; of several adapters those of each."""
    from rich.text import Text

    parts = (
        {f"{name}, ": one for name, one in data.train.datasets.items()}
        if has_several_adapters(data)
        else {"": data.train}
    )
    return Text("\n").join(
        render_row(part.row(index), data.tokenizer, name=f"{prefix}row {index}")
        for prefix, part in parts.items()
        for index in range(rows)
    )


def has_several_adapters(data: Data) -> bool:
    """Whether several adapters read, each rows of its own."""
    return isinstance(data.train, FixedTrainingMixture)


def render_row(row: Row, tokenizer: Tokenizer, *, name: str) -> "Text":
    """The targets of a row: a headline, then their text."""
    from rich.text import Text

    segments, weights = row["segment_ids"], row["loss_weights"]
    predicted, padding = int(np.count_nonzero(weights)), int(np.count_nonzero(segments == 0))
    text = Text(f"{name}: {segments.max()} documents, {predicted} tokens to predict, {padding} of padding\n")
    for start, stop in runs(segments, weights):
        if segments[start] == 0:
            continue
        if start == 0 or segments[start] != segments[start - 1]:
            text.append(f"▌{segments[start]} ", MARK)
            if row["tokens"][start] != tokenizer.bos:  # of a conversation, or of a document that was cut
                text.append(tokenizer.decode_all(row["tokens"][start : start + 1]), NOT_AT_ALL)
        text.append(tokenizer.decode_all(row["targets"][start:stop]), colour(weights[start]))
    return text.append("\n")


def runs(segments: np.ndarray, weights: np.ndarray) -> list[tuple[int, int]]:
    """(start, stop) of the stretches in which neither segment nor weight changes.

    Stretches are decoded whole, because one character may take several ids.

    >>> runs(np.array([1, 1, 2]), np.array([1.0, 1.0, 1.0]))
    [(0, 2), (2, 3)]
    """
    changes = np.flatnonzero((np.diff(segments) != 0) | (np.diff(weights) != 0)) + 1
    bounds = [0, *changes.tolist(), len(segments)]
    return list(pairwise(bounds))


def colour(weight: float) -> str:
    """The style of a token of this loss weight."""
    if weight == 0:
        return NOT_AT_ALL
    return FULL if weight >= 1 else PARTLY
