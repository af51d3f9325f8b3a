"""Notes: what a model says about every token of the training text, kept beside it and put into each row.

A token has one place in the stores of a run, however often, and in whatever rows, it is seen. What depends on its own
document alone, such as its probability by a fixed model, is therefore computed once and looked up ever after.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from .batches import RowSource
from .rows import NO_TOKEN, Row

Annotations = Mapping[str, np.ndarray]  # field -> [tokens of all stores, ...]


@dataclass(frozen=True)
class AnnotatedDataset:
    """Rows of a data set, with further fields looked up for each of their tokens; zeros in padding.

    A row with a token that was not `seen` [tokens] when notes were taken raises LookupError: zeros would be believed.
    """

    dataset: Any
    annotations: Annotations
    is_annotated: np.ndarray

    def row(self, index: int) -> Row:
        row = self.dataset.row(index)
        if not self.is_annotated[row["places"][row["places"] != NO_TOKEN]].all():
            raise LookupError(f"row {index} was not among those that notes were taken of, and its tokens have none")
        return row | {field: look_up(values, row["places"]) for field, values in self.annotations.items()}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.dataset, name)  # how many rows there are, and what they are made of, is as it was


def look_up(values: np.ndarray, token_index: np.ndarray) -> np.ndarray:
    """`values` [tokens, ...] at `places` [sequence]; zeros where there is no token."""
    found = values[np.maximum(token_index, 0)]
    found[token_index == NO_TOKEN] = 0
    return found


def unannotated_batches(
    dataset: RowSource, rows: Iterable[int], *, is_annotated: np.ndarray, size: int
) -> Iterable[list[Row]]:
    """Lists of at most `size` of `rows` that hold all their tokens whose `seen` [tokens] is not set; sets it."""
    waiting: list[Row] = []
    for index in rows:
        row = dataset.row(index)
        places = row["places"][row["places"] != NO_TOKEN]
        if not is_annotated[places].all():
            is_annotated[places] = True
            waiting.append(row)
        if len(waiting) == size:
            yield waiting
            waiting = []
    if waiting:
        yield waiting


def store_annotations(annotations: Annotations, rows: list[Row], values: Mapping[str, np.ndarray]) -> None:
    """Put `values` [rows, sequence, ...] of some rows where they belong."""
    for number, row in enumerate(rows):
        real = row["places"] != NO_TOKEN
        for field, array in annotations.items():
            array[row["places"][real]] = values[field][number][real]


Annotate = Callable[[list[Row]], Mapping[str, np.ndarray]]  # rows -> field -> [rows, sequence, ...]
