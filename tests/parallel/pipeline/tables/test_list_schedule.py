"""Orders become ticks, as early as possible; a deadlock is refused and its circle printed."""

import numpy as np
import pytest

from meshwright.configs.errors import UserError
from meshwright.parallel.pipeline.tables.dependencies import Pass
from meshwright.parallel.pipeline.tables.list_schedule import device_orders, tabulate
from meshwright.parallel.pipeline.tables.placement import straight
from meshwright.parallel.pipeline.tables.table import Op

F, I, W, S, T = Op.F, Op.I, Op.W, Op.S, Op.T  # noqa: E741


def passes(text):
    """The passes of a text such as `F0 I0 W0`, on chunk 0."""
    return [Pass(Op[word[0]], int(word[1:]), -1 if word[0] in "ST" else 0) for word in text.split()]


def render(table):
    """One string for each device: op and microbatch of each tick, `..` where it is idle."""
    names = np.array(["..", "F", "I", "W", "B", "S", "T"])
    return [" ".join(names[op] + (str(k) if op else "") for op, k in zip(ops, ks, strict=True))
            for ops, ks in zip(table.op.T, table.microbatch.T, strict=True)]  # fmt: skip


def test_every_pass_starts_as_early_as_its_order_and_needs_allow():
    table = tabulate([passes("F0 F1 I0 W0 I1 W1"), passes("F0 I0 W0 F1 I1 W1")], straight(2), algorithm=0, name="mine")
    assert render(table) == ["F0 F1 .. I0 W0 .. I1 W1", ".. F0 I0 W0 F1 I1 W1 .."]
    assert table.slot.T.tolist() == [[0, 1, -1, 0, 0, -1, 1, 1], [-1, 0, 0, 0, 0, 0, 0, -1]]


@pytest.mark.parametrize(
    ("algorithm", "ticks"),
    [(1, ["F0 .. S0 T0 .. I0 W0", ".. F0 S0 T0 I0 W0 .."]), (2, ["F0 .. S0 .. I0 W0 T0", ".. F0 S0 I0 W0 T0 .."])],
)
def test_the_last_backward_waits_for_all_t_or_all_s(algorithm, ticks):
    order = passes("F0 S0 T0 I0 W0" if algorithm == 1 else "F0 S0 I0 W0 T0")
    assert render(tabulate([order, order], straight(2), algorithm=algorithm, name="mine")) == ticks


def test_a_deadlock_is_printed_as_a_chain_of_passes():
    orders = [passes("F0 I0 F1 W0 I1 W1"), passes("F1 F0 I0 W0 I1 W1")]
    with pytest.raises(
        UserError,
        match=r"schedule mine .*: device 0 at I\(microbatch 0, stage 0\) for I\(microbatch 0, stage 1\) of device 1, .*"
        r"device 1 at F\(microbatch 1, stage 1\) for F\(microbatch 1, stage 0\) of device 0;",
    ):
        tabulate(orders, straight(2), algorithm=0, name="mine")


def test_a_pass_that_no_device_does_is_named():
    with pytest.raises(UserError, match=r"device 0 waits at I\(microbatch 0, stage 0\) for I\(microbatch 0, stage 1\)"):
        tabulate([passes("F0 I0 W0"), passes("F0")], straight(2), algorithm=0, name="mine")


def test_device_orders_are_the_inverse_of_tabulate():
    orders = [passes("F0 F1 I0 W0 I1 W1"), passes("F0 I0 W0 F1 I1 W1")]
    table = tabulate(orders, straight(2), algorithm=0, name="mine")
    assert device_orders(table) == orders
