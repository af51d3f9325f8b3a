"""W in the gaps: nothing is lost, the limit holds, and looking ahead never locks a device out."""

from collections import Counter

import pytest

from meshwright.parallel.pipeline.tables.dependencies import Pass
from meshwright.parallel.pipeline.tables.placement import straight, v_shaped
from meshwright.parallel.pipeline.tables.table import Op
from meshwright.parallel.pipeline.tables.weight_gradient_fill import filled


def v_order(microbatches):
    """A device of a V: each microbatch down, up, and back, one after the other."""
    return [Pass(op, k, chunk) for k in range(microbatches)
            for op, chunk in ((Op.F, 0), (Op.F, 1), (Op.I, 1), (Op.I, 0))]  # fmt: skip


def most_held(order):
    """Activations between F and W."""
    held = peak = 0
    for one in order:
        held += (one.op is Op.F) - (one.op is Op.W)
        peak = max(peak, held)
    return peak


@pytest.mark.parametrize("window", [1, 2, 8])
@pytest.mark.parametrize("limit", [2, 3, 5])
def test_every_i_gets_its_w_and_the_limit_holds(window, limit):
    orders = filled([v_order(4)] * 3, v_shaped(3), limits=[limit] * 3, window=window)
    for order in orders:
        done = Counter(one.op for one in order)
        assert done == {Op.F: 8, Op.I: 8, Op.W: 8}
        assert all(order.index(one._replace(op=Op.I)) < order.index(one) for one in order if one.op is Op.W)
        assert most_held(order) <= limit


def test_a_later_forward_does_not_take_the_room_of_the_one_in_front():
    """Room for two: were microbatch 1 let in while 0 is away, 0 could not come back, and nothing would ever end."""
    first, _ = filled([v_order(2)] * 2, v_shaped(2), limits=[2, 2], window=8)
    chunks = [(one.microbatch, one.chunk) for one in first if one.op is Op.F]
    assert chunks == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_with_room_it_is_let_in():
    first, _ = filled([v_order(2)] * 2, v_shaped(2), limits=[3, 3], window=8)
    assert [(one.microbatch, one.chunk) for one in first if one.op is Op.F][:2] == [(0, 0), (1, 0)]


def test_a_window_of_one_keeps_the_order():
    order = v_order(3)
    for made in filled([order] * 2, v_shaped(2), limits=[9, 9]):
        assert [one for one in made if one.op is not Op.W] == order


def test_orders_that_wait_in_a_circle_are_no_users_mistake():
    """Generators never make them; a reader of CSV goes through `tabulate`, which explains."""
    with pytest.raises(AssertionError, match="orders wait in a circle"):
        filled([[Pass(Op.I, 0, 0), Pass(Op.F, 0, 0)]], straight(1), limits=[1])
