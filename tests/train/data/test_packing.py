"""All packers: every token once, no row too long, and as few rows as documented."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.train.data.packing import PACKERS, best_fit, best_fit_rows, concat

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=30).map(np.array)
ROW = st.integers(1, 16)


@pytest.mark.parametrize("method", PACKERS)
@settings(deadline=None, max_examples=60)
@given(lengths=LENGTHS, row=ROW)
def test_each_token_is_in_exactly_one_slice(method, lengths, row):
    slices = PACKERS[method](lengths, row)
    counts = [np.zeros(length, int) for length in lengths]
    for document, start, length in zip(slices.document, slices.start, slices.length, strict=True):
        assert start + length <= lengths[document]
        counts[document][start : start + length] += 1
    assert all((count == 1).all() for count in counts)


@pytest.mark.parametrize("method", PACKERS)
@settings(deadline=None, max_examples=60)
@given(lengths=LENGTHS, row=ROW)
def test_rows_are_numbered_in_order_and_never_overfull(method, lengths, row):
    slices = PACKERS[method](lengths, row)
    assert (np.diff(slices.row) >= 0).all()
    used = np.bincount(slices.row, weights=slices.length)
    assert used.min() >= 1
    assert used.max() <= row


@pytest.mark.parametrize("method", PACKERS)
@settings(deadline=None, max_examples=60)
@given(lengths=LENGTHS, row=ROW, seed=st.integers(0, 1000))
def test_rows_do_not_depend_on_the_order_of_documents(method, lengths, row, seed):
    shuffled = np.random.default_rng(seed).permutation(lengths)
    assert PACKERS[method](shuffled, row).row.max() == PACKERS[method](lengths, row).row.max()


@settings(deadline=None, max_examples=60)
@given(lengths=LENGTHS, row=ROW)
def test_concat_pads_the_last_row_only(lengths, row):
    used = np.bincount(concat(lengths, row).row, weights=concat(lengths, row).length)
    assert (used[:-1] == row).all()
    assert len(used) == -(-lengths.sum() // row)


@settings(deadline=None, max_examples=60)
@given(lengths=LENGTHS, row=ROW)
def test_best_fit_cuts_only_what_is_longer_than_a_row(lengths, row):
    slices = best_fit(lengths, row)
    assert (np.bincount(slices.document) == -(-lengths // row)).all()


def test_best_fit_places_long_rests_first():
    assert best_fit(np.array([1, 1, 4, 4, 9]), 5).row.max() + 1 == 4, "4 + 1, 4 + 1, 5 and the 4 left of 9"


@settings(deadline=None, max_examples=60)
@given(lengths=st.lists(st.integers(1, 16), min_size=1, max_size=30))
def test_best_fit_starts_a_row_only_when_no_row_has_space(lengths):
    """Against the definition: among the rows with enough space, one with the least."""
    lengths = sorted(lengths, reverse=True)
    space: list[int] = []
    for length, row in zip(lengths, best_fit_rows(lengths, 16), strict=True):
        fits = [left for left in space if left >= length]
        if row == len(space):
            assert not fits
            space.append(16)
        else:
            assert space[row] == min(fits)
        space[row] -= length
