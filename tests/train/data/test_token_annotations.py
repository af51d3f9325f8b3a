"""Notes of tokens: looked up by place, and refused where none were taken."""

import numpy as np
import pytest

from meshwright.train.data.rows import NO_TOKEN
from meshwright.train.data.token_annotations import AnnotatedDataset, store_annotations, unannotated_batches


class Rows:
    """Two tokens and padding a row."""

    rows = 3

    def row(self, index):
        return {"token_index": np.array([2 * index, 2 * index + 1, NO_TOKEN])}


def test_a_row_that_no_notes_were_taken_of_is_refused_rather_than_full_of_zeros():
    notes, seen = {"logprobs": np.zeros(6, np.float32)}, np.zeros(6, bool)
    for some in unannotated_batches(Rows(), [1, 2], is_annotated=seen, size=2):
        store_annotations(notes, some, {"logprobs": np.array([[-1.0, -2.0, -9.0], [-3.0, -4.0, -9.0]])})
    noted = AnnotatedDataset(Rows(), notes, seen)
    np.testing.assert_array_equal(noted.row(2)["logprobs"], [-3.0, -4.0, 0.0])
    assert noted.rows == 3
    with pytest.raises(LookupError, match="row 0"):
        noted.row(0)
