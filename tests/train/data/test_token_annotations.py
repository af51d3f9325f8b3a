"""Annotations of tokens: looked up by index, and refused where there are none."""

import numpy as np
import pytest

from meshwright.train.data.rows import NO_TOKEN
from meshwright.train.data.token_annotations import AnnotatedDataset, store_annotations, unannotated_batches


class Rows:
    """Rows of two tokens and padding."""

    rows = 3

    def row(self, index):
        return {"token_index": np.array([2 * index, 2 * index + 1, NO_TOKEN])}


def test_a_row_without_annotations_is_refused_rather_than_filled_with_zeros():
    notes, is_annotated = {"logprobs": np.zeros(6, np.float32)}, np.zeros(6, bool)
    for some in unannotated_batches(Rows(), [1, 2], is_annotated=is_annotated, size=2):
        store_annotations(notes, some, {"logprobs": np.array([[-1.0, -2.0, -9.0], [-3.0, -4.0, -9.0]])})
    noted = AnnotatedDataset(Rows(), notes, is_annotated)
    np.testing.assert_array_equal(noted.row(2)["logprobs"], [-3.0, -4.0, 0.0])
    assert noted.rows == 3
    with pytest.raises(LookupError, match="row 0"):
        noted.row(0)
