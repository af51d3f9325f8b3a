"""Batches: any number of processes and any restart read the same samples; errors of the thread are raised."""

import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.configs.errors import UserError
from meshwright.train.data.batches import batches


class NumberedRows:
    """Row `index` is the index; sample `broken` cannot be read."""

    def __init__(self, broken=None):
        self.broken = broken

    def row(self, index):
        if index == self.broken:
            raise UserError(f"sample {index} is broken")
        return {"index": np.array([index])}


def read(start, stop, *, global_batch, rows=slice(None)):
    parts = batches(NumberedRows(), start=start, stop=stop, global_batch=global_batch, rows=rows, prefetch=2)
    return [batch["index"][:, 0].tolist() for batch in parts]


@settings(deadline=None, max_examples=20)
@given(per_process=st.integers(1, 3), processes=st.integers(1, 4), steps=st.integers(1, 5), resumed=st.integers(0, 5))
def test_any_split_over_processes_and_time_reads_every_sample_once(per_process, processes, steps, resumed):
    global_batch, reached = per_process * processes, min(resumed, steps) * per_process * processes
    samples = []
    for process in range(processes):
        rows = slice(process * per_process, (process + 1) * per_process)
        before = read(0, reached, global_batch=global_batch, rows=rows)
        after = read(reached, steps * global_batch, global_batch=global_batch, rows=rows)
        samples.append(before + after)
    together = [index for step in zip(*samples, strict=True) for share in step for index in share]
    assert together == list(range(steps * global_batch))


def test_batches_without_a_stop_do_not_end():
    endless = batches(NumberedRows(), start=1 << 40, global_batch=4, prefetch=3)
    assert [next(endless)["index"][0, 0] - (1 << 40) for _ in range(5)] == [0, 4, 8, 12, 16]
    endless.close()


def test_an_error_in_the_background_is_raised():
    broken = batches(NumberedRows(broken=9), start=0, global_batch=4, prefetch=2)
    assert next(broken)["index"][0, 0] == 0
    with pytest.raises(UserError, match="sample 9 is broken"):
        list(broken)


def test_closing_ends_the_background_thread():
    before = set(threading.enumerate())
    open_batches = batches(NumberedRows(), start=0, global_batch=2, prefetch=2)
    next(open_batches)
    assert set(threading.enumerate()) - before, "nothing is read ahead"
    open_batches.close()
    for thread in set(threading.enumerate()) - before:
        thread.join(timeout=5)
    assert not set(threading.enumerate()) - before


@pytest.mark.parametrize(
    ("rows", "stop", "message"), [(slice(4, 8), 8, "no rows 4 to 8"), (slice(0, 4), 6, "data.global_batch: 4 .* 6 ")]
)
def test_impossible_slices_are_refused(rows, stop, message):
    with pytest.raises(UserError, match=message):
        batches(NumberedRows(), start=0, stop=stop, global_batch=4, rows=rows, prefetch=1)
