"""W in the gaps: no pass is lost, the limit holds, and choosing later passes never causes a deadlock."""

from collections import Counter

import pytest

from meshwright.parallel.pipeline.tables.dependencies import Pass
from meshwright.parallel.pipeline.tables.placement import straight, v_shaped
from meshwright.parallel.pipeline.tables.table import Op
from meshwright.parallel.pipeline.tables.weight_gradient_fill import fill_weight_gradients


def v_order(microbatches):
    """The order of a device of a V: both forwards, then both backwards, for one microbatch after the other."""
    return [Pass(op, k, chunk) for k in range(microbatches)
            for op, chunk in ((Op.F, 0), (Op.F, 1), (Op.I, 1), (Op.I, 0))]  # fmt: skip


def peak_activations(order):
    """Activations between F and W."""
    held = peak = 0
    for step in order:
        held += (step.op is Op.F) - (step.op is Op.W)
        peak = max(peak, held)
    return peak


@pytest.mark.parametrize("window", [1, 2, 8])
@pytest.mark.parametrize("limit", [2, 3, 5])
def test_every_i_gets_its_w_and_the_limit_holds(window, limit):
    orders = fill_weight_gradients([v_order(4)] * 3, v_shaped(3), limits=[limit] * 3, window=window)
    for order in orders:
        done = Counter(step.op for step in order)
        assert done == {Op.F: 8, Op.I: 8, Op.W: 8}
        assert all(order.index(step._replace(op=Op.I)) < order.index(step) for step in order if step.op is Op.W)
        assert peak_activations(order) <= limit


def test_a_later_forward_does_not_take_the_memory_of_an_earlier_pass():
    """A limit of two: if microbatch 1 began while 0 is on another device, 0 could not return: a deadlock."""
    first, _ = fill_weight_gradients([v_order(2)] * 2, v_shaped(2), limits=[2, 2], window=8)
    chunks = [(step.microbatch, step.chunk) for step in first if step.op is Op.F]
    assert chunks == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_a_later_forward_goes_first_if_the_limit_allows():
    first, _ = fill_weight_gradients([v_order(2)] * 2, v_shaped(2), limits=[3, 3], window=8)
    assert [(step.microbatch, step.chunk) for step in first if step.op is Op.F][:2] == [(0, 0), (1, 0)]


def test_a_window_of_one_keeps_the_order():
    order = v_order(3)
    for filled in fill_weight_gradients([order] * 2, v_shaped(2), limits=[9, 9]):
        assert [step for step in filled if step.op is not Op.W] == order


def test_orders_that_deadlock_are_an_assertion_error():
    """Generators never make them, and a CSV goes through `tabulate`, which explains the deadlock."""
    with pytest.raises(AssertionError, match="orders wait in a circle"):
        fill_weight_gradients([[Pass(Op.I, 0, 0), Pass(Op.F, 0, 0)]], straight(1), limits=[1])
