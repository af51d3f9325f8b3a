"""A schedule as text: the table cell by cell, and no more than fits."""

from meshwright.parallel.pipeline.tables.ascii import lines
from meshwright.parallel.pipeline.tables.schedules.registry import make_table


def test_1f1b_reads_as_in_the_papers():
    assert lines(make_table("1f1b", devices=2, microbatches=2), width=80) == [
        "device 0  F0 F1 .  I0 W0 .  I1 W1",
        "device 1  .  F0 I0 W0 F1 I1 W1 .",
    ]


def test_a_second_chunk_has_small_letters_and_vocabulary_passes_have_none():
    table = make_table("v-half", devices=4, microbatches=4, vocabulary=2)
    rows = [line.split()[2:] for line in lines(table, width=400)]
    ops = [cell for row in rows for cell in row if cell != "."]
    assert len(ops) == (table.op > 0).sum()
    assert {cell[0] for cell in ops} == set("FIWfiwST")
    assert [rows[0].index(f"F{number}") for number in range(4)] == [0, 1, 2, 3]


def test_what_does_not_fit_is_cut_at_a_tick_and_says_so():
    table = make_table("gpipe", devices=4, microbatches=16)
    for line, full in zip(lines(table, width=60), lines(table, width=1000), strict=True):
        assert len(line) <= 60 and line.endswith(" ...")
        assert full.startswith(line.removesuffix(" ..."))
