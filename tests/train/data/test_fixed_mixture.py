"""Batches with rows of several data sets: each is read as alone."""

import numpy as np

from meshwright.train.data.fixed_mixture import FixedHeldOutMixture, FixedMixture


class Counted:
    """Rows that tell whose and which they are; of what is held out the first `rows`."""

    def __init__(self, name, rows=0):
        self.name, self.rows = name, rows

    def row(self, index):
        return {"segment_ids": np.ones(2, np.int32), "told": (self.name, index)}


def test_every_batch_has_the_rows_of_each_in_their_own_order():
    dealt = FixedMixture({"a": Counted("a"), "b": Counted("b"), "c": Counted("c")}, rows={"a": 3, "b": 1, "c": 2})
    batches = [[dealt.row(6 * batch + place) for place in range(6)] for batch in range(3)]
    for number, name, count in ((0, "a", 3), (1, "b", 1), (2, "c", 2)):
        found = [row["told"][1] for batch in batches for row in batch if row["told"][0] == name]
        assert found == list(range(3 * count))
        assert all((row["adapters"] == number).all() for batch in batches for row in batch if row["told"][0] == name)
    assert [row["told"][0] for row in batches[1]] == ["a", "a", "a", "b", "c", "c"]


def test_what_is_held_out_ends_with_the_last_row_of_the_longest():
    """Five rows at two a batch are three batches; padding fills up the other's rows."""
    held_out = FixedHeldOutMixture({"a": Counted("a", 5), "b": Counted("b", 1)}, rows={"a": 2, "b": 1})
    assert held_out.padded_rows(3) == held_out.rows == 9
