"""Permutations from integers: stable over versions, different for every key."""

from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.train.data.permutation import permutation

KEY = st.lists(st.integers(0, 2**40), min_size=1, max_size=4)


@settings(deadline=None, max_examples=50)
@given(count=st.integers(0, 50), key=KEY)
def test_the_result_is_a_permutation(count, key):
    assert sorted(permutation(count, *key)) == list(range(count))


@settings(deadline=None, max_examples=50)
@given(one=KEY, other=KEY)
def test_different_keys_give_different_orders(one, other):
    same = permutation(50, *one).tolist() == permutation(50, *other).tolist()
    assert same == (one == other)


def test_a_zero_at_the_end_of_a_key_counts():
    assert permutation(50, 1, 2).tolist() != permutation(50, 1, 2, 0).tolist()


def test_the_order_of_old_runs_does_not_change():
    """Old checkpoints continue with the same samples: never update these numbers."""
    assert permutation(10, 0, 1, 2).tolist() == [8, 1, 7, 6, 5, 4, 0, 3, 2, 9]
