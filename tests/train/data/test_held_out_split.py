"""The split depends on each text alone."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.train.data.held_out_split import select_held_out, text_identity

TEXTS = [f"document {number}" for number in range(2000)]


def split(texts, fraction):
    return {
        text
        for text, out in zip(texts, select_held_out(map(text_identity, texts), fraction=fraction), strict=True)
        if out
    }


@pytest.mark.parametrize("fraction", [0.02, 0.5])
def test_about_the_fraction_is_held_out(fraction):
    assert len(split(TEXTS, fraction)) / len(TEXTS) == pytest.approx(fraction, rel=0.3)


def test_other_documents_do_not_change_the_split():
    whole, half = split(TEXTS, 0.1), split(TEXTS[::-2], 0.1)
    assert half == whole & set(TEXTS[::-2])
    assert split(TEXTS, 0.05) < whole


def test_copies_of_a_text_are_on_the_same_side():
    out = select_held_out([*map(text_identity, TEXTS), *map(text_identity, TEXTS)], fraction=0.1)
    assert (out[: len(TEXTS)] == out[len(TEXTS) :]).all()


@settings(deadline=None)
@given(st.lists(st.integers(0, 2**64 - 1), min_size=2, max_size=6, unique=True), st.floats(1e-6, 0.999))
def test_two_different_texts_leave_neither_side_empty(identities, fraction):
    out = select_held_out(identities, fraction=fraction)
    assert out.any()
    assert not out.all()


@pytest.mark.parametrize(("identities", "fraction"), [([5, 6, 7], 0.0), ([9], 1e-9), ([9, 9], 1e-9), ([], 0.1)])
def test_nothing_is_held_out_of_one_text_or_by_no_fraction(identities, fraction):
    assert not np.any(select_held_out(identities, fraction=fraction))
