"""A preview of the training data as coloured text: what the model will be trained to predict.

    row 0: 2 documents, 250 tokens to predict, 6 of padding
    ▌1 import os<|endoftext|>▌2 class Queue: ...

Green tokens have loss weight 1, yellow ones less, dim ones 0; `▌n` starts document n of the row. The two answers of a
pair are two documents, the chosen one first.
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
    """The first `rows` training rows; with several adapters, the first rows of each."""
    from rich.text import Text

    datasets = {"": data.train}
    if isinstance(data.train, FixedTrainingMixture):  # of several adapters
        datasets = {f"{name}, ": dataset for name, dataset in data.train.datasets.items()}
    return Text("\n").join(
        render_row(dataset.row(index), data.tokenizer, name=f"{prefix}row {index}")
        for prefix, dataset in datasets.items()
        for index in range(rows)
    )


def render_row(row: Row, tokenizer: Tokenizer, *, name: str) -> "Text":
    """A row as a headline and the text of its targets."""
    from rich.text import Text

    segments, weights = row["segment_ids"], row["loss_weights"]
    predicted, padding = int(np.count_nonzero(weights)), int(np.count_nonzero(segments == 0))
    text = Text(f"{name}: {segments.max()} documents, {predicted} tokens to predict, {padding} of padding\n")
    for start, stop in runs(segments, weights):
        if segments[start] == 0:
            continue
        if start == 0 or segments[start] != segments[start - 1]:
            text.append(f"▌{segments[start]} ", MARK)
            if row["tokens"][start] != tokenizer.bos:  # of a conversation, or of a document that was cut before
                text.append(tokenizer.decode_all(row["tokens"][start : start + 1]), NOT_AT_ALL)
        text.append(tokenizer.decode_all(row["targets"][start:stop]), colour(weights[start]))
    return text.append("\n")


def runs(segments: np.ndarray, weights: np.ndarray) -> list[tuple[int, int]]:
    """(start, stop) of the ranges in which neither segment nor weight changes.

    Ranges are decoded at once, because one character may have several ids.

    >>> runs(np.array([1, 1, 2]), np.array([1.0, 1.0, 1.0]))
    [(0, 2), (2, 3)]
    """
    changes = np.flatnonzero((np.diff(segments) != 0) | (np.diff(weights) != 0)) + 1
    bounds = [0, *changes.tolist(), len(segments)]
    return list(pairwise(bounds))


def colour(weight: float) -> str:
    """The style of a token with this loss weight."""
    if weight == 0:
        return NOT_AT_ALL
    return FULL if weight >= 1 else PARTLY
