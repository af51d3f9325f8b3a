"""Batches with rows of several data sets: each is read as in a run of its own."""

import numpy as np

from meshwright.train.data.fixed_mixture import FixedHeldOutMixture, FixedMixture


class CountedRows:
    """Rows with the name of their data set and their number."""

    def __init__(self, name, rows=0):
        self.name, self.rows = name, rows

    def row(self, index):
        return {"segment_ids": np.ones(2, np.int32), "told": (self.name, index)}


def test_every_batch_has_the_rows_of_each_in_their_own_order():
    mixture = FixedMixture(
        {"a": CountedRows("a"), "b": CountedRows("b"), "c": CountedRows("c")}, rows={"a": 3, "b": 1, "c": 2}
    )
    batches = [[mixture.row(6 * batch + place) for place in range(6)] for batch in range(3)]
    for number, name, count in ((0, "a", 3), (1, "b", 1), (2, "c", 2)):
        rows = [row["told"][1] for batch in batches for row in batch if row["told"][0] == name]
        assert rows == list(range(3 * count))
        assert all((row["adapters"] == number).all() for batch in batches for row in batch if row["told"][0] == name)
    assert [row["told"][0] for row in batches[1]] == ["a", "a", "a", "b", "c", "c"]


def test_what_is_held_out_ends_with_the_last_row_of_the_longest():
    """Five rows at two per batch are three batches; the other data set is padded."""
    held_out = FixedHeldOutMixture({"a": CountedRows("a", 5), "b": CountedRows("b", 1)}, rows={"a": 2, "b": 1})
    assert held_out.padded_rows(3) == held_out.rows == 9
