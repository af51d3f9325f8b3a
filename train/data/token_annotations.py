"""Annotations of training tokens, such as the outputs of a frozen model, which are added to each row.

A token has one index in the token stores of a run, in whatever rows it occurs. A value that depends on its own document
alone, such as its probability under a frozen model, is computed once and then looked up.
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
    """A data set whose rows have annotations of each token as further fields; zeros in padding.

    A row with a token that is not annotated (`is_annotated` [tokens]) raises LookupError.
    """

    dataset: Any
    annotations: Annotations
    is_annotated: np.ndarray

    def row(self, index: int) -> Row:
        row = self.dataset.row(index)
        if not self.is_annotated[row["token_index"][row["token_index"] != NO_TOKEN]].all():
            raise LookupError(f"row {index} has tokens that were not annotated")
        return row | {field: look_up(values, row["token_index"]) for field, values in self.annotations.items()}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.dataset, name)  # all else is that of the data set


def look_up(values: np.ndarray, token_index: np.ndarray) -> np.ndarray:
    """`values` [tokens, ...] at `token_index` [sequence]; zeros at padding."""
    result = values[np.maximum(token_index, 0)]
    result[token_index == NO_TOKEN] = 0
    return result


def unannotated_batches(
    dataset: RowSource, rows: Iterable[int], *, is_annotated: np.ndarray, size: int
) -> Iterable[list[Row]]:
    """Batches of at most `size` of `rows` that cover all tokens not yet annotated; sets `is_annotated` [tokens]."""
    batch: list[Row] = []
    for index in rows:
        row = dataset.row(index)
        tokens = row["token_index"][row["token_index"] != NO_TOKEN]
        if not is_annotated[tokens].all():
            is_annotated[tokens] = True
            batch.append(row)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def store_annotations(annotations: Annotations, rows: list[Row], values: Mapping[str, np.ndarray]) -> None:
    """Store `values` [rows, sequence, ...] of the tokens of `rows`."""
    for number, row in enumerate(rows):
        is_token = row["token_index"] != NO_TOKEN
        for field, array in annotations.items():
            array[row["token_index"][is_token]] = values[field][number][is_token]


Annotate = Callable[[list[Row]], Mapping[str, np.ndarray]]  # rows -> field -> [rows, sequence, ...]
