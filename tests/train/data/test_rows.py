"""Rows: inputs and targets."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.train.data.packing import PACKERS
from meshwright.train.data.rows import build_row, row_table

BOS, EOS, PAD = 2, 1, 0


def rows_of(store, packing):
    table = packing.table([np.arange(len(store))], store.lengths)
    return [build_row(store, table, index=index, shape=packing.shape) for index in range(len(table))]


def test_the_arrays_of_two_documents_and_a_cut(stores, packings):
    first, second = rows_of(stores([3, 7]), packings())
    assert first["tokens"].tolist() == [BOS, 100, 101, BOS, 200, 201, 202, 203]
    assert first["targets"].tolist() == [100, 101, EOS, 200, 201, 202, 203, 204]
    assert first["segment_ids"].tolist() == [1, 1, 1, 2, 2, 2, 2, 2]
    assert first["positions"].tolist() == [0, 1, 2, 0, 1, 2, 3, 4]
    assert second["tokens"].tolist() == [204, 205, PAD, PAD, PAD, PAD, PAD, PAD]
    assert second["targets"].tolist() == [205, EOS, PAD, PAD, PAD, PAD, PAD, PAD]
    assert second["loss_weights"].tolist() == [1, 1, 0, 0, 0, 0, 0, 0]
    assert second["segment_ids"].tolist() == [1, 1, 0, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("method", PACKERS)
@settings(deadline=None, max_examples=30)
@given(lengths=st.lists(st.integers(2, 30), min_size=1, max_size=8))
def test_every_token_is_predicted_once_from_the_token_before_it(method, lengths, stores, packings):
    """The pairs (input, target) over all rows are exactly those of the documents taken one by one."""
    store = stores(lengths)
    actual = []
    for arrays in rows_of(store, packings(method)):
        weighted = arrays["loss_weights"] == 1
        actual += zip(arrays["tokens"][weighted].tolist(), arrays["targets"][weighted].tolist(), strict=True)
    expected = []
    for start, stop in zip(store.offsets, store.offsets[1:], strict=False):
        document = store.tokens[start:stop].tolist()
        expected += zip([BOS, *document], document, strict=False)
    assert sorted(actual) == sorted(expected)


@pytest.mark.parametrize("method", PACKERS)
@settings(deadline=None, max_examples=30)
@given(lengths=st.lists(st.integers(2, 30), min_size=1, max_size=8))
def test_a_segment_is_one_document_counted_from_zero(method, lengths, stores, packings):
    for arrays in rows_of(stores(lengths), packings(method)):
        assert ((arrays["segment_ids"] == 0) == (arrays["loss_weights"] == 0)).all()
        for segment in range(1, arrays["segment_ids"].max() + 1):
            here = arrays["segment_ids"] == segment
            inner = arrays["targets"][here][:-1]  # the last may be the end token
            assert len(set(inner // 100)) <= 1
            assert arrays["positions"][here].tolist() == list(range(here.sum()))


def test_no_documents_give_no_rows():
    table = row_table([], np.array([3, 4]), method="concat", sequence_length=8)
    assert len(table) == 0


def test_arrays_have_the_documented_dtypes(stores, packings):
    (arrays, *_) = rows_of(stores([4, 9]), packings())
    types = {name: (array.dtype.name, array.shape) for name, array in arrays.items()}
    integers = dict.fromkeys(("tokens", "targets", "segment_ids", "positions"), ("int32", (8,)))
    floats = dict.fromkeys(("loss_weights", "labels"), ("float32", (8,)))
    assert types == integers | floats | {"token_index": ("int64", (8,))}
